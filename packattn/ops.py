"""Registration of `torch.ops.packattn`: the compiled modules where they were built, fake implementations always.

Schemas come from `packattn.schemas`. CPU code is in `packattn._C`, CUDA boundaries in `packattn._C_cuda`; the Triton
and torch implementations are Python and imported at the first call.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packattn.schemas import SCHEMAS


def _load(name: str) -> bool:
    """Import a compiled module; False where it was not built."""
    if importlib.util.find_spec(f"packattn.{name}") is None:
        return False
    try:
        importlib.import_module(f"packattn.{name}")
    except ImportError as error:
        raise ImportError(
            f"packattn.{name} is built but does not load with torch {torch.__version__}; rebuild it with "
            f"`pip install --no-build-isolation --force-reinstall --no-deps .`, or delete the file. {error}"
        ) from error
    return True


HAS_C = _load("_C")
HAS_C_CUDA = torch.version.cuda is not None and _load("_C_cuda")

_library = torch.library.Library("packattn", "FRAGMENT")
if not HAS_C:
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema)


def _boundaries_torch(position_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from packattn.boundaries import boundaries_torch

    return boundaries_torch(position_ids, attention_mask)


# The twin serves every device that no compiled kernel serves: a kernel registered for a device wins over it.
_library.impl("boundaries", _boundaries_torch, "CompositeExplicitAutograd")


def _python_backend(module: str, function: str) -> Callable[..., Any]:
    def call(*arguments: Tensor | float | None) -> Any:
        run: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return run(*arguments)

    return call


for _device in ("CPU", "CUDA"):
    _library.impl("attention_forward_triton", _python_backend("packattn.kernels.launch", "forward"), _device)
    _library.impl("attention_backward_triton", _python_backend("packattn.kernels.launch", "backward"), _device)
for _walk in ("first_fit", "best_fit"):
    _library.impl(f"pack_{_walk}", _python_backend("packattn.data.fit", _walk), "CompositeExplicitAutograd")
_library.impl("attention_forward_torch", _python_backend("packattn.blocked", "forward"), "CompositeExplicitAutograd")
_library.impl("attention_backward_torch", _python_backend("packattn.blocked", "backward"), "CompositeExplicitAutograd")


@torch.library.register_fake("packattn::boundaries")
def _(position_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = position_ids.numel()

    def int32(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.int32, device=position_ids.device)

    return int32(tokens), int32(tokens), int32(tokens + 1), int32(4)


@torch.library.register_fake("packattn::pack_first_fit")
@torch.library.register_fake("packattn::pack_best_fit")
def _(lengths: Tensor, *_: int) -> Tensor:
    return torch.empty_like(lengths)


def lse_dtype(q: Tensor) -> torch.dtype:
    """Statistics are float32, float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, *_: Tensor | float | None, normed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q))
    return q.new_empty(*q.shape[:2], v.shape[2]), lse, lse.new_empty(2, *lse.shape) if normed else lse.new_empty(0)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, norm: Tensor,
    k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor, order: Tensor | None, sinks: Tensor | None,
    *_: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    heads = 0 if sinks is None else q.shape[1]
    dsinks = q.new_empty(heads, dtype=lse_dtype(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


for _name in SCHEMAS:
    if _name.startswith("attention_"):
        _forward = functools.partial(_fake_forward, normed=_name == "attention_forward_triton")
        _fake = _forward if "forward" in _name else _fake_backward
        torch.library.register_fake(f"packattn::{_name}", _fake, lib=_library)
