"""The Hugging Face side: the only part of packattn that imports transformers."""

from typing import TYPE_CHECKING

from transformers import AttentionInterface, AttentionMaskInterface

from packattn.hf.attention import attention_forward
from packattn.hf.hooks import NAME
from packattn.hf.masks import packed_mask
from packattn.hf.patch import Patch, patch
from packattn.hf.verify import verify

if TYPE_CHECKING:
    from packattn.hf.trainer import BalancedTrainer, BalancedTrainerMixin

__all__ = ["BalancedTrainer", "BalancedTrainerMixin", "Patch", "patch", "verify"]

# Models can be loaded with attn_implementation="packattn" from here on; they raise until they are patched.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, packed_mask)


def __getattr__(name: str) -> object:
    """What is built on transformers' Trainer, loaded at first use: Trainer is large, and a patch does not need it."""
    if name in __all__:
        from packattn.hf import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'packattn.hf' has no attribute {name!r}")
