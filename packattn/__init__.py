"""Boundary-aware packed attention for Hugging Face models: patch, pack, train; no sequence sees another."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from packattn.attention import PackedAttention, packed_attention, packed_attention_with_lse, schedule
from packattn.boundaries import Boundaries, boundaries, cu_seqlens_from_position_ids
from packattn.errors import UnsupportedMaskError, UnsupportedModelError
from packattn.losses import count_over_ranks, mean_over_sequences, mean_over_tokens, pool, token_losses
from packattn.mask import PackedMask
from packattn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

if TYPE_CHECKING:
    from packattn.data import BalancedPackingSampler, PackingCollator, pack, pack_dataset, packing_report
    from packattn.hf.patch import Patch, patch
    from packattn.hf.verify import verify

# Loaded at first use, so that importing packattn imports neither transformers nor triton.
_DATA = ("BalancedPackingSampler", "PackingCollator", "pack", "pack_dataset", "packing_report")
_LAZY = {**dict.fromkeys(("patch", "Patch", "verify"), "packattn.hf"), **dict.fromkeys(_DATA, "packattn.data")}

__all__ = [
    "BalancedPackingSampler",
    "Boundaries",
    "PackedAttention",
    "PackedMask",
    "PackingCollator",
    "Patch",
    "UnsupportedMaskError",
    "UnsupportedModelError",
    "boundaries",
    "count_over_ranks",
    "cu_seqlens_from_position_ids",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "mean_over_sequences",
    "mean_over_tokens",
    "pack",
    "pack_dataset",
    "packed_attention",
    "packed_attention_with_lse",
    "packing_report",
    "patch",
    "pool",
    "schedule",
    "token_losses",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'packattn' has no attribute {name!r}")
