"""The Hugging Face side: the only part of packattn that imports transformers."""

from packattn.requirements import missing

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise missing("packattn.patch, as packattn.verify,", "transformers", "hf") from error

from packattn.hf.attention import attention_forward
from packattn.hf.hooks import NAME
from packattn.hf.masks import packed_mask
from packattn.hf.patch import Patch, patch
from packattn.hf.verify import verify

__all__ = ["Patch", "patch", "verify"]

# Models can be loaded with attn_implementation="packattn" from here on; they raise until they are patched.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, packed_mask)
