"""The Hugging Face side: the only part of packattn that imports transformers."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from packattn.hf.callback import PackingCallback
    from packattn.hf.trainer import BalancedTrainer, BalancedTrainerMixin

# Loaded at first use: transformers' Trainer is large, and a patch does not need it.
_LAZY = {"BalancedTrainer": "trainer", "BalancedTrainerMixin": "trainer", "PackingCallback": "callback"}

__all__ = ["BalancedTrainer", "BalancedTrainerMixin", "PackingCallback", "Patch", "patch", "verify"]

# Models can be loaded with attn_implementation="packattn" from here on; they raise until they are patched.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, packed_mask)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"packattn.hf.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'packattn.hf' has no attribute {name!r}")
