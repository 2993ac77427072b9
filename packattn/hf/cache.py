"""The caches of transformers: their names among the arguments of a forward, and whether one holds tokens."""

from typing import Any

from torch import Tensor

# The names of a cache among the arguments of a forward.
CACHES = ("cache", "past_key_values", "cache_params", "state")


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache that a forward was given, under any of the names that transformers has for it."""
    for name in CACHES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def is_paged(arguments: dict[str, Any]) -> bool:
    """Whether a forward is one of transformers' continuous batching, whose requests its own masks keep apart."""
    return type(cache_of(arguments)).__name__ == "PagedAttentionCache"


def holds_tokens(cache: Any) -> bool:
    """Whether a forward continues a cache: decided without reading the device."""
    if cache is None or isinstance(cache, list):  # RWKV has a list of states, and none before its first token
        return cache is not None
    # A static cache counts its tokens on the device; it is made for generation, never for packed training.
    if getattr(cache, "is_compileable", False):
        return True
    if hasattr(cache, "has_previous_state"):
        try:
            if cache.has_previous_state():
                return True
        except (TypeError, ValueError, IndexError):  # none that tells, or none yet
            pass
    if getattr(cache, "linear_cache", None):  # MiniMax's states, beside the layers
        return True
    try:
        return bool(cache.get_seq_length() > 0)
    except (AttributeError, ValueError):  # a cache of recurrent states only
        return False


def is_prepared(attention_mask: Any) -> bool:
    """Whether masks were made before the forward, as generate does for static caches."""
    return isinstance(attention_mask, dict) or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 4)
