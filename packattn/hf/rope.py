"""Rotary embeddings whose frequencies depend on the longest position of what runs: longrope and dynamic NTK.

On a packed row they would take the longest of all its sequences, so they run by sequence. Dynamic ones also remember
the longest position that they have seen; before every packed forward they forget it, so that a sequence gets what a
model that was just loaded gives it alone.
"""

import torch
from torch import Tensor, nn


def config_rope_types(config: object) -> set[str]:
    """The rope types of a config, which holds one dict, or one for every layer type."""
    return _types(getattr(config, "rope_parameters", None))


def rope_types(module: nn.Module) -> set[str]:
    """The rope types of a rotary embedding, by its config; empty for every other module."""
    return config_rope_types(getattr(module, "config", None)) if "RotaryEmbedding" in type(module).__name__ else set()


def looks_at_length(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding that gives a sequence other frequencies beside a longer one."""
    return bool({"longrope", "dynamic"} & rope_types(module))


def can_forget(module: nn.Module) -> bool:
    """Whether a module is a dynamic rotary embedding that keeps what it was made with."""
    return "dynamic" in rope_types(module) and bool(_originals(module)) and hasattr(module, "original_max_seq_len")


def forget(module: nn.Module) -> None:
    """Take a dynamic rotary embedding back to what it was made as; no other module is touched."""
    if "dynamic" not in rope_types(module):
        return
    for name, original in _originals(module).items():
        setattr(module, name.replace("original_inv_freq", "inv_freq"), original.clone())
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)


def _originals(module: nn.Module) -> dict[str, Tensor]:
    named = {**vars(module), **module._buffers}
    return {
        name: value for name, value in named.items() if name.endswith("original_inv_freq") and torch.is_tensor(value)
    }


def _types(parameters: object) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    nested = [_types(value) for value in parameters.values()]
    return {str(parameters["rope_type"])}.union(*nested) if "rope_type" in parameters else set().union(*nested)
