"""Launchers: allocate, take tiles from the table, build a grid from the token count, launch."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from packattn import dropout
from packattn.kernels.backward import _bwd_delta_kernel, _bwd_dkdv_kernel, _bwd_dq_kernel
from packattn.kernels.forward import _fwd_kernel
from packattn.kernels.table import LARGEST_HEAD_DIM, Tile, family, parts_of, tile_for

_DELTA_ROWS = 64
# Four programs for each of 128 multiprocessors. With fewer, a GPU waits for the longest; beyond, passes over the shares
# of dk and dv cost more than they save where sequences are short.
_ENOUGH_PROGRAMS = 512
# A thread of dK/dV takes nearly all of the 255 registers it can have: so many warps a multiprocessor holds at once.
_RESIDENT_WARPS = 8
# Rows of a tile, at most 128, are 32-bit offsets from its first.
_STRIDE_LIMIT = 2**31 // 128


def _blocks(rows: int, block: int) -> int:
    """Blocks that hold the rows: triton.cdiv, which takes microseconds on the host."""
    return -(-rows // block)


def _split(programs: int, group: int) -> int:
    """The least divisor of a group's query heads that makes enough programs; else all of them."""
    for n in range(1, group):
        if group % n == 0 and programs * n >= _ENOUGH_PROGRAMS:
            return n
    return group


class Plan(NamedTuple):
    """What a launch of each pass looks like, from shapes alone: tiles, rows of a tile, and the split of dK/dV."""

    forward: Tile
    dq: Tile
    dkdv: Tile
    group: int
    heads_k: int

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """(rows of a tile, rows of a token) of forward, dQ and dK/dV: queries have a row for each head of a group."""
        return (self.forward.block_m, self.group), (self.dq.block_m, self.group), (self.dkdv.block_n, 1)

    def tiles(self, tokens: int, tokens_k: int) -> tuple[int, int, int]:
        """Tiles of forward, dQ and dK/dV."""
        forward, dq, dkdv = (
            _blocks(n * each, rows) for n, (rows, each) in zip((tokens, tokens, tokens_k), self.rows, strict=True)
        )
        return forward, dq, dkdv

    def split(self, tokens_k: int) -> int:
        """Programs of a tile of dK/dV, each with as many of the query heads."""
        return _split(_blocks(max(tokens_k, 1), self.dkdv.block_n) * self.heads_k, self.group)


def plan(heads_q: int, heads_k: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan of a problem; it depends neither on the tokens nor on the lengths of the sequences."""
    group, dim, gpu = heads_q // heads_k, max(head_dim, head_dim_v), family(device)
    forward_tile, dq_tile, dkdv_tile = (tile_for(gpu, name, dim, dtype, group) for name in ("forward", "dq", "dkdv"))
    return Plan(forward_tile, dq_tile, dkdv_tile, group, heads_k)


def _plan_of(q: Tensor, k: Tensor, v: Tensor) -> Plan:
    return plan(q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.dtype, q.device)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@torch.compiler.assume_constant_result  # a compiler cannot trace the questions for the kind of the GPU
def _constants(
    heads_q: int, heads_k: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[tuple[int, int], ...], int, int]:
    """Plan.rows, warps of a program of dK/dV, multiprocessors."""
    made = plan(heads_q, heads_k, head_dim, head_dim_v, dtype, device)
    return made.rows, made.dkdv.num_warps, multiprocessors(device)


def _dealt(work: Tensor, columns: int, rounds: int) -> Tensor:
    """Places 0, 1, ... of `work` (big first), those of the first rounds dealt to columns of equal sums: int64, as long.

    Programs that a GPU holds at once are dealt to its multiprocessors in turn, one round after another, and only later
    ones go where there is room. So in each round the biggest goes to the column with the least so far, and the columns
    that a last round does not reach stand last.
    """
    n, dealt_out = work.shape[0], columns * rounds
    load = work.new_zeros(columns)
    places = []
    for i, shares in enumerate(torch.nn.functional.pad(work, (0, dealt_out))[:dealt_out].split(columns)):
        rank = load.argsort(stable=True).argsort()
        places.append(rank + i * columns)
        load = load + shares[rank]
    dealt = torch.stack(places)
    missing = (dealt >= n).sum(0).argsort(stable=True)
    order = torch.arange(n + dealt_out, device=work.device)
    order[:dealt_out] = dealt[:, missing].flatten()
    return order[:n]


def launch_order(
    k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor, heads_q: int, heads_k: int, head_dim: int,
    head_dim_v: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Tiles of the three passes, big ones first, so that the last programs to run are short: int32, (tiles of all,).

    Those of dK/dV, of which a GPU holds the most at once, are dealt evenly to its multiprocessors besides, where more
    than half of them start at once. Computed on the device, once for a mask; of use to this group of heads, larger head
    dim and dtype only.
    """
    tiles, warps, count = _constants(heads_q, heads_k, head_dim, head_dim_v, dtype, k_start.device)
    spans = ((k_start, k_end), (k_start, k_end), (q_start, q_end))
    orders, works = [], []
    for (start, end), (rows, each) in zip(spans, tiles, strict=True):
        first = torch.arange(0, start.shape[0] * each, rows, device=start.device)
        last = ((first + rows - 1) // each).clamp(max=start.shape[0] - 1)
        work, order = torch.sort(end[last] - start[first // each], descending=True, stable=True)
        orders.append(order)
        works.append(work)
    n = orders[2].shape[0]
    columns = max(1, count // (heads_k * _split(n * heads_k, heads_q // heads_k)))
    rounds = max(1, _RESIDENT_WARPS // warps)
    if n < 2 * columns * rounds:  # else those that go where there is room even out the rest
        orders[2] = orders[2][_dealt(works[2], columns, rounds)]
    return torch.cat(orders).int()


def _order_of(order: Tensor | None, plan: Plan, tokens: int, tokens_k: int) -> tuple[Tensor | None, ...]:
    """The orders of forward, dQ and dK/dV, or None where there is none that fits."""
    counts = plan.tiles(tokens, tokens_k)
    if order is None or order.shape[0] != sum(counts):
        return None, None, None
    forward, dq, dkdv = order.split(counts)
    return forward, dq, dkdv


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    reasons = []
    if q.device.type == "cpu" and isinstance(_fwd_kernel, triton.runtime.JITFunction):
        reasons.append("the tensors are on the CPU, where Triton runs only in its interpreter")
    if q.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        reasons.append(
            "compute capability below 8.0 has no tensor cores in Triton; use torch's "
            "scaled_dot_product_attention (SDPA) there"
        )
    if max(q.shape[2], v.shape[2]) > LARGEST_HEAD_DIM:
        reasons.append(f"head dim {max(q.shape[2], v.shape[2])} > {LARGEST_HEAD_DIM}")
    rows = q.shape[0] * q.shape[1] // k.shape[1]
    if rows > 2**31 - 256:
        reasons.append(f"{rows} pairs of a token and a head of its group, which 32-bit numbers do not count")
    stride = max(x.stride(0) for x in (q, k, v))
    if stride >= _STRIDE_LIMIT:
        reasons.append(f"a token stride of {stride} elements, of which a tile would need 64-bit offsets; copy the view")
    if reasons:
        raise NotImplementedError(f'backend "triton" cannot run this: {"; ".join(reasons)}. Use backend="torch".')


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _shared(
    q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, anchors: Tensor | None, seed: Tensor | None,
    softmax_scale: float, softcap: float, dropout_p: float,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that all kernels but the delta pre-pass take."""
    # As a signed 32-bit number: the kernel takes the bits.
    threshold = dropout.threshold(dropout_p)
    slopes = (0, 0) if alibi_slopes is None else alibi_slopes.stride()
    return {
        "seed_ptr": seed, "slopes_ptr": alibi_slopes, "anchors_ptr": anchors,
        "stride_qt": q.stride(0), "stride_qh": q.stride(1),
        "stride_kt": k.stride(0), "stride_kh": k.stride(1),
        "stride_vt": v.stride(0), "stride_vh": v.stride(1),
        "stride_sh": slopes[0], "stride_st": slopes[1],
        "tokens": q.shape[0], "tokens_k": k.shape[0], "heads_k": k.shape[1],
        "scale": softmax_scale, "softcap": softcap,
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold, "keep_scale": 1 / (1 - dropout_p),
        "GROUP": q.shape[1] // k.shape[1], "HEAD_DIM": q.shape[2], "HEAD_DIM_V": v.shape[2],
        "HAS_SOFTCAP": softcap > 0, "HAS_ALIBI": alibi_slopes is not None, "HAS_DROPOUT": seed is not None,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 and q.dtype == torch.float32 else "ieee",
    }  # fmt: skip


def _tile_options(tile: Tile, shared: dict[str, Any]) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "PARTS": parts_of(shared["HEAD_DIM"], tile.width), "PARTS_V": parts_of(shared["HEAD_DIM_V"], tile.width),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages, "HELD": tile.held,
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor,
    order: Tensor | None, sinks: Tensor | None, alibi_slopes: Tensor | None, anchors: Tensor | None,
    seed: Tensor | None, softmax_scale: float, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator `attention_forward_triton`; arguments as in `packattn.schemas`."""
    _check(q, k, v)
    tokens, heads, _ = q.shape
    out = q.new_empty(tokens, heads, v.shape[2])
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    norm = lse.new_empty(2, heads, tokens)
    if tokens == 0:
        return out, lse, norm
    made = _plan_of(q, k, v)
    tiles = _order_of(order, made, tokens, k.shape[0])[0]
    shared = _shared(q, k, v, alibi_slopes, anchors, seed, softmax_scale, softcap, dropout_p)
    with _on(q.device):
        _fwd_kernel[(made.tiles(tokens, k.shape[0])[0] * k.shape[1],)](
            q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse, norm_ptr=norm, k_start_ptr=k_start,
            k_end_ptr=k_end, order_ptr=tiles, sinks_ptr=sinks, stride_ot=out.stride(0), stride_oh=out.stride(1),
            HAS_ORDER=tiles is not None, HAS_SINKS=sinks is not None, **shared, **_tile_options(made.forward, shared),
        )  # fmt: skip
    return out, lse, norm


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, norm: Tensor,
    k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor, order: Tensor | None, sinks: Tensor | None,
    alibi_slopes: Tensor | None, anchors: Tensor | None, seed: Tensor | None, softmax_scale: float, softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator `attention_backward_triton`; arguments as in `packattn.schemas`."""
    _check(q, k, v)
    if dout.stride(0) >= _STRIDE_LIMIT:  # which autograd decides, and no caller can help
        dout = dout.contiguous()
    tokens, heads, _ = q.shape
    tokens_k, heads_k, _ = k.shape
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    made = _plan_of(q, k, v)
    _, tiles_q, tiles_k = _order_of(order, made, tokens, tokens_k)
    shared = _shared(q, k, v, alibi_slopes, anchors, seed, softmax_scale, softcap, dropout_p)
    saved = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout, "norm_ptr": norm, "delta_ptr": delta,
        "stride_dot": dout.stride(0), "stride_doh": dout.stride(1),
    }  # fmt: skip
    with _on(q.device):
        if tokens > 0:
            options = _tile_options(made.dq, shared)
            _bwd_delta_kernel[(_blocks(tokens, _DELTA_ROWS), heads)](
                out, dout, None if dlse is None else dlse.contiguous(), delta, out.stride(0), out.stride(1),
                dout.stride(0), dout.stride(1), tokens, HEAD_DIM_V=v.shape[2], PARTS_V=options["PARTS_V"],
                BLOCK_M=_DELTA_ROWS, HAS_DLSE=dlse is not None,
            )  # fmt: skip
            _bwd_dq_kernel[(made.tiles(tokens, tokens_k)[1] * heads_k,)](
                dq_ptr=dq, k_start_ptr=k_start, k_end_ptr=k_end, order_ptr=tiles_q, stride_dqt=dq.stride(0),
                stride_dqh=dq.stride(1), HAS_ORDER=tiles_q is not None, **saved, **shared, **options,
            )  # fmt: skip
        if tokens_k > 0:
            # The second stage: each share of a group's heads has a float32 copy of dk and dv, added in fixed order.
            split = made.split(tokens_k)
            shares = (dk, dv) if split == 1 else tuple(
                x.new_empty(split, *x.shape, dtype=torch.float32) for x in (dk, dv)
            )  # fmt: skip
            (dks, dkt, dkh), (dvs, dvt, dvh) = ((0, *x.stride())[-4:-1] for x in shares)
            _bwd_dkdv_kernel[(made.tiles(tokens, tokens_k)[2] * heads_k * split,)](
                dk_ptr=shares[0], dv_ptr=shares[1], q_start_ptr=q_start, q_end_ptr=q_end, order_ptr=tiles_k,
                stride_dks=dks, stride_dkt=dkt, stride_dkh=dkh, stride_dvs=dvs, stride_dvt=dvt, stride_dvh=dvh,
                SPLIT=split, HAS_ORDER=tiles_k is not None, **saved, **shared,
                **_tile_options(made.dkdv, shared),
            )  # fmt: skip
            if split > 1:
                dk, dv = (share.sum(0).to(k.dtype) for share in shares)
    if sinks is None:
        return dq, dk, dv, q.new_empty(0, dtype=torch.float32)
    lse = lse.clamp(min=torch.finfo(lse.dtype).min)  # -inf where a query sees neither a key nor a sink
    return dq, dk, dv, -(torch.exp(sinks[:, None] - lse) * delta).sum(1)
