"""Launchers: allocate, choose tiles from one table, build a grid from the token count, launch."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from packattn import dropout
from packattn.kernels.backward import _bwd_delta_kernel, _bwd_dkdv_kernel, _bwd_dq_kernel
from packattn.kernels.forward import _fwd_kernel


class Tile(NamedTuple):
    """BLOCK_M query rows and BLOCK_N keys, and how Triton schedules them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Tiles by padded head dim, for pass: (family with 160 KB and more of shared memory a block, family with 99 KB).
# float32 halves both blocks. Chosen by registers, spills and shared memory as the compiler reports them.
_TILES = {
    ("forward", 16): (Tile(128, 64, 4, 3), Tile(128, 64, 4, 2)),
    ("forward", 32): (Tile(128, 64, 4, 3), Tile(128, 64, 4, 2)),
    ("forward", 64): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    ("forward", 128): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    ("forward", 256): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1)),
    ("dq", 16): (Tile(128, 64, 4, 2), Tile(128, 64, 4, 2)),
    ("dq", 32): (Tile(128, 64, 4, 2), Tile(128, 64, 4, 2)),
    ("dq", 64): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("dq", 128): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 1)),
    ("dq", 256): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    ("dkdv", 16): (Tile(64, 128, 4, 2), Tile(64, 128, 4, 2)),
    ("dkdv", 32): (Tile(64, 128, 4, 2), Tile(64, 128, 4, 2)),
    ("dkdv", 64): (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
    ("dkdv", 128): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 1)),
    ("dkdv", 256): (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
}
_DELTA_ROWS = 64
LARGEST_HEAD_DIM = 256


def block_dim(dim: int) -> int:
    """The power of two, at least 16, that holds a head dim."""
    return max(16, int(triton.next_power_of_2(dim)))


def tile_for(kernel: str, dim: int, dtype: torch.dtype, small_memory: bool, group: int) -> Tile:
    """The tile of a pass: "forward", "dq" or "dkdv"; dim is the larger padded head dim."""
    tile = _TILES[kernel, dim][small_memory]
    if dtype == torch.float32:
        tile = tile._replace(block_m=max(16, tile.block_m // 2), block_n=max(16, tile.block_n // 2), num_stages=1)
    if kernel != "dkdv":
        # The rows of a tile hold all query heads of a group, of at least one token.
        tile = tile._replace(block_m=max(tile.block_m, triton.next_power_of_2(group)))
    return tile


def _small_memory(device: torch.device) -> bool:
    """Whether a block has less than 160 KB of shared memory: all but data-centre NVIDIA GPUs."""
    if device.type == "cpu" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) not in ((8, 0), (9, 0), (10, 0), (10, 3))


def _check(q: Tensor, v: Tensor) -> None:
    reasons = []
    if q.device.type == "cpu" and isinstance(_fwd_kernel, triton.runtime.JITFunction):
        reasons.append("the tensors are on the CPU, where Triton runs only in its interpreter")
    if q.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        reasons.append("compute capability below 8.0 has no tensor cores in Triton; use torch's SDPA there")
    if max(q.shape[2], v.shape[2]) > LARGEST_HEAD_DIM:
        reasons.append(f"head dim {max(q.shape[2], v.shape[2])} > {LARGEST_HEAD_DIM}")
    if reasons:
        raise NotImplementedError(f'backend "triton" cannot run this: {"; ".join(reasons)}. Use backend="torch".')


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _shared(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, softmax_scale: float, softcap: float, dropout_p: float
) -> dict[str, Any]:
    """The arguments that all kernels but the delta pre-pass take."""
    # As a signed 32-bit number: the kernel takes the bits.
    threshold = dropout.threshold(dropout_p)
    return {
        "seed_ptr": seed,
        "stride_qt": q.stride(0), "stride_qh": q.stride(1),
        "stride_kt": k.stride(0), "stride_kh": k.stride(1),
        "stride_vt": v.stride(0), "stride_vh": v.stride(1),
        "tokens": q.shape[0], "tokens_k": k.shape[0],
        "scale": softmax_scale, "softcap": softcap,
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold, "keep_scale": 1 / (1 - dropout_p),
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[2], "BLOCK_D": block_dim(q.shape[2]),
        "HEAD_DIM_V": v.shape[2], "BLOCK_DV": block_dim(v.shape[2]),
        "HAS_SOFTCAP": softcap > 0, "HAS_DROPOUT": seed is not None,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 and q.dtype == torch.float32 else "ieee",
    }  # fmt: skip


def _with_tile(kernel: str, shared: dict[str, Any], q: Tensor) -> dict[str, Any]:
    dim = max(shared["BLOCK_D"], shared["BLOCK_DV"])
    tile = tile_for(kernel, dim, q.dtype, _small_memory(q.device), shared["GROUP"])
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return shared | blocks | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def forward(
    q: Tensor, k: Tensor, v: Tensor, k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor,
    sinks: Tensor | None, seed: Tensor | None, softmax_scale: float, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator `attention_forward_triton`; arguments as in `packattn.schemas`."""
    _check(q, v)
    tokens, heads, _ = q.shape
    out = q.new_empty(tokens, heads, v.shape[2])
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    if tokens == 0:
        return out, lse
    shared = _shared(q, k, v, seed, softmax_scale, softcap, dropout_p)
    options = _with_tile("forward", shared, q)
    grid = (triton.cdiv(tokens, options["BLOCK_M"] // options["GROUP"]), k.shape[1])
    with _on(q.device):
        _fwd_kernel[grid](
            q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse, k_start_ptr=k_start, k_end_ptr=k_end, sinks_ptr=sinks,
            stride_ot=out.stride(0), stride_oh=out.stride(1), HAS_SINKS=sinks is not None, **options,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, k_start: Tensor,
    k_end: Tensor, q_start: Tensor, q_end: Tensor, sinks: Tensor | None, seed: Tensor | None, softmax_scale: float,
    softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator `attention_backward_triton`; arguments as in `packattn.schemas`."""
    _check(q, v)
    tokens, heads, _ = q.shape
    tokens_k, heads_k, _ = k.shape
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    shared = _shared(q, k, v, seed, softmax_scale, softcap, dropout_p)
    strides = {"stride_dot": dout.stride(0), "stride_doh": dout.stride(1)}
    saved = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout, "lse_ptr": lse, "delta_ptr": delta}
    with _on(q.device):
        if tokens > 0:
            _bwd_delta_kernel[(triton.cdiv(tokens, _DELTA_ROWS), heads)](
                out, dout, None if dlse is None else dlse.contiguous(), delta, out.stride(0), out.stride(1),
                dout.stride(0), dout.stride(1), tokens, HEAD_DIM_V=v.shape[2], BLOCK_DV=shared["BLOCK_DV"],
                BLOCK_M=_DELTA_ROWS, HAS_DLSE=dlse is not None,
            )  # fmt: skip
            options = _with_tile("dq", shared, q)
            grid = (triton.cdiv(tokens, options["BLOCK_M"] // options["GROUP"]), heads_k)
            _bwd_dq_kernel[grid](
                dq_ptr=dq, k_start_ptr=k_start, k_end_ptr=k_end, stride_dqt=dq.stride(0), stride_dqh=dq.stride(1),
                **saved, **strides, **options,
            )  # fmt: skip
        if tokens_k > 0:
            options = _with_tile("dkdv", shared, q)
            _bwd_dkdv_kernel[(triton.cdiv(tokens_k, options["BLOCK_N"]), heads_k)](
                dk_ptr=dk, dv_ptr=dv, q_start_ptr=q_start, q_end_ptr=q_end, stride_dkt=dk.stride(0),
                stride_dkh=dk.stride(1), stride_dvt=dv.stride(0), stride_dvh=dv.stride(1), **saved, **strides,
                **options,
            )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, q.new_empty(0, dtype=torch.float32)
    return dq, dk, dv, -(torch.exp(sinks[:, None] - lse) * delta).sum(1)
