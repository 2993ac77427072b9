"""What a call of a patched model may bring, and the errors that say what it may not."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packattn.mask import PackedMask


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache that a forward was given, under any of the names that transformers has for it."""
    for name in ("cache", "past_key_values", "cache_params", "state"):
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def holds_tokens(cache: Any) -> bool:
    """Whether a forward continues a cache: decided without reading the device."""
    if cache is None:
        return False
    # A static cache counts its tokens on the device; it is made for generation, never for packed training.
    if getattr(cache, "is_compileable", False):
        return True
    if hasattr(cache, "has_previous_state"):
        try:
            if cache.has_previous_state():
                return True
        except (TypeError, ValueError):
            pass
    try:
        return bool(cache.get_seq_length() > 0)
    except (AttributeError, ValueError):  # a cache of recurrent states only
        return False


def is_prepared(attention_mask: Any) -> bool:
    """Whether masks were made before the forward, as generate does for static caches."""
    return isinstance(attention_mask, dict) or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 4)


def no_restarts(position_ids: Any, attention_mask: Any, tokens: Tensor) -> None:
    """Assert on the device that a forward over a cache is not packed."""
    n = tokens.shape[1]
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or n == 1 or is_prepared(attention_mask):
        return
    whole = position_ids.diff(dim=1) == 1
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] >= n:
        real = attention_mask[:, :n] if attention_mask.shape[1] == n else attention_mask[:, -n:]
        whole = whole | (real[:, 1:] == 0) | (real[:, :-1] == 0)
    torch._assert_async(
        whole.all(),
        "position_ids restart in a forward over a cache that is static or holds tokens: packattn isolates packed rows "
        "in forwards without one. Leave out the cache (past_key_values), or give one sequence a row.",
    )


def first_or_later(position_ids: Tensor, attention_mask: Any, first: int) -> None:
    """Assert on the device that positions begin where the model's own do."""
    right = position_ids >= first
    if isinstance(attention_mask, Tensor):
        right = right | (attention_mask == 0)
    torch._assert_async(
        right.all(),
        f"position_ids hold values below {first}, where the positions of this model begin (the RoBERTa family counts "
        f"from after its padding index): use packattn.PackingCollator(start_position={first}).",
    )


def check(tokens: Tensor, position_ids: Any, attention_mask: Any, arguments: dict[str, Any]) -> None:
    """Raise on anything that packattn would have to guess about."""
    sdpa = F.scaled_dot_product_attention  # replaced while such a split lasts
    if not torch.compiler.is_compiling() and sdpa.__module__.startswith("torch.distributed"):
        raise NotImplementedError(
            "a row split over ranks (context parallel) is not supported by packattn, whose ranks each hold whole "
            "sequences. Split the examples over the ranks instead: packattn.BalancedPackingSampler."
        )
    rows, n = tokens.shape[:2]
    if rows == 0 or n == 0:
        raise ValueError(f"input_ids must hold at least one row of at least one token, got shape {(rows, n)}.")
    if isinstance(attention_mask, (dict, PackedMask)):
        raise ValueError(
            "attention_mask is a dict of masks that were made before packattn saw position_ids. Pass a 2-D "
            "attention_mask or none."
        )
    for name, value in (("position_ids", position_ids), ("attention_mask", attention_mask)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype.is_floating_point:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be an integer tensor of shape (rows, n) = {(rows, n)}, got {got}.")
        if name == "position_ids" and value.ndim == 3:
            if value.shape[0] == 4 and value.shape[2] == n:
                continue  # text positions, then the planes of M-RoPE
            raise ValueError(
                f"position_ids of shape {tuple(value.shape)} have several planes (M-RoPE), from which packattn does "
                "not guess boundaries. Pass them with the text positions before them, (4, rows, n), or the text "
                "positions alone, (rows, n)."
            )
        if name == "attention_mask" and value.ndim == 4:
            raise ValueError(
                f"attention_mask of shape {tuple(value.shape)} is dense, but a patched model makes its mask from "
                "position_ids. Pass position_ids that restart with every sequence, and no attention_mask or a 2-D one."
            )
        if value.ndim != 2 or value.shape[1] != n or value.shape[0] not in (rows, 1):
            raise ValueError(f"{name} must have shape (rows, n) = {(rows, n)}, as the input, got {tuple(value.shape)}.")
        if value.device != tokens.device:
            raise ValueError(f"{name} must be on the device of the input, {tokens.device}, got {value.device}.")
    explicit = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if arguments.get(name) is not None]
    if explicit and position_ids is None:
        raise ValueError(
            f"{' and '.join(explicit)} came without position_ids, by which packattn finds the sequences. Pass "
            "position_ids that restart with every sequence (PackingCollator makes them)."
        )
    seq_idx = arguments.get("seq_idx")
    if isinstance(seq_idx, Tensor) and isinstance(position_ids, Tensor) and seq_idx.shape == position_ids.shape:
        torch._assert_async(
            ((seq_idx.diff(dim=1) == 0) | (position_ids.diff(dim=1) != 1)).all(),
            "seq_idx begins a sequence where position_ids go on; packattn separates sequences by position_ids.",
        )
