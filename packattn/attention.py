"""packed_attention: argument checks, the choice of backend, and the autograd Function over the operators."""

from typing import Any, Literal

import torch
from torch import Tensor

from packattn import ops
from packattn.arguments import described, real, whole
from packattn.mask import LaunchOrder, PackedMask
from packattn.requirements import how_to_build
from packattn.schemas import BACKENDS

Backend = Literal["triton", "cpu", "torch"]

# What float32 holds with room for the products and quotients of a scale, a cap and a score, on every backend.
_LEAST, _MOST = 2.0**-60, 2.0**60
# Dropout compares 32-bit words with round(dropout_p * 2**32), which has to be one.
_MOST_DROPPED = 1 - 2.0**-32


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """triton on CUDA and ROCm, cpu on the CPU where the extension is built; torch elsewhere and for float64."""
    if dtype != torch.float64:
        if device.type == "cuda":
            return "triton"
        if device.type == "cpu" and ops.HAS_C:
            return "cpu"
    return "torch"


def schedule(
    mask: PackedMask, *, heads_q: int, heads_k: int, head_dim: int, head_dim_v: int | None = None, dtype: torch.dtype
) -> PackedMask:
    """The mask with the order in which GPU kernels launch their tiles, big ones first.

    Hardware starts programs in order, so that the last to run are then short; tiles of dK/dV that start at once are
    dealt evenly to the multiprocessors. Made on the device, once for a mask that many layers of one shape share; layers
    of another shape or dtype run without. Results are the same with and without it. Other backends need none: the mask
    comes back as it is.

    Raises:
        TypeError, ValueError: an argument that does not fit, named.
    """
    _check_mask(mask)
    heads_q, heads_k = whole("heads_q", heads_q, 1), whole("heads_k", heads_k, 1)
    head_dim = whole("head_dim", head_dim, 1)
    dim_v = head_dim if head_dim_v is None else whole("head_dim_v", head_dim_v, 1)
    if heads_q % heads_k:
        raise ValueError(f"heads_k must divide heads_q={heads_q}, got {heads_k}.")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, that of q, got {described(dtype)}.")
    if default_backend(mask.k_start.device, dtype) != "triton":
        return mask
    from packattn.kernels.launch import launch_order

    tiles = launch_order(*mask[:4], heads_q, heads_k, head_dim, dim_v, dtype)
    return mask._replace(order=LaunchOrder(tiles, heads_q // heads_k, max(head_dim, dim_v), dtype))


def _tiles_in_order(order: LaunchOrder | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """The tiles of an order that is of this problem: in that of another shape some are missing."""
    if order is None or order[1:] != (q.shape[1] // k.shape[1], max(q.shape[2], v.shape[2]), q.dtype):
        return None
    return order.tiles


class PackedAttention(torch.autograd.Function):
    """Packed attention as an autograd Function; `packed_attention` checks the arguments and calls it.

    apply(q, k, v, k_start, k_end, q_start, q_end, order, sinks, alibi_slopes, anchors, seed, softmax_scale, softcap,
    dropout_p, backend)
    returns (out, lse); gradients flow to q, k, v and sinks, from both results.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor,
        order: Tensor | None, sinks: Tensor | None, alibi_slopes: Tensor | None, anchors: Tensor | None,
        seed: Tensor | None, softmax_scale: float, softcap: float, dropout_p: float, backend: Backend,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        spans, options = (k_start, k_end, q_start, q_end, order), (softmax_scale, softcap, dropout_p)
        run = getattr(torch.ops.packattn, f"attention_forward_{backend}").default
        tensors = (*spans, sinks, alibi_slopes, anchors, seed)
        out, lse, norm = run(q, k, v, *tensors, *options)
        ctx.save_for_backward(q, k, v, out, lse, norm, *tensors)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("double backward (create_graph=True) through packed attention is not supported.")
        saved = ctx.saved_tensors
        out, sinks = saved[3], saved[11]
        dout = torch.zeros_like(out) if dout is None else _last_dim_contiguous(dout)
        run = getattr(torch.ops.packattn, f"attention_backward_{ctx.backend}").default
        dq, dk, dv, dsinks = run(dout, dlse, *saved, *ctx.options)
        spans, others = (None,) * 5, (None,) * 7
        return dq, dk, dv, *spans, None if sinks is None else dsinks, *others


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PackedMask,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    alibi_anchors: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """Attention over a packed stream: every query sees the keys of its span and nothing else.

    Equivalent to (for one head, without the options):

        scores = (q @ k.T * softmax_scale).masked_fill(~mask.to_dense(), float("-inf"))
        out = scores.softmax(-1) @ v

    Args:
        q: (tokens, heads_q, head_dim), float32, float16 or bfloat16 (float64 on the torch backend).
        k: (tokens_k, heads_k, head_dim), dtype and device of q; heads_k divides heads_q.
        v: (tokens_k, heads_k, head_dim_v), likewise.
        mask: the spans, on the device of q.
        softmax_scale: factor of the scores, from 2**-60 to 2**60; head_dim ** -0.5 if None.
        softcap: scores become `softcap * tanh(scores / softcap)`, from 2**-60 to 2**60; 0 for none.
        sinks: (heads_q,), floating: one logit per head that takes part in the softmax and has no value.
        alibi_slopes: (heads_q,) or (heads_q, tokens), floating, no gradient: the score of query i and key j gets the
            bias `-slope * |anchor_i - j|` (Press et al. 2022, arXiv 2108.12409), after softcap.
        alibi_anchors: int32 (tokens,): the key at which each query stands, by default its own index.
        dropout_p: probability of dropping a softmax probability, from 0 to 1 - 2**-32; the kept ones are scaled by
            1 / (1 - dropout_p).
        backend: "triton", "cpu" or "torch"; None takes the one of the device (see `python -m packattn info`).

    Returns:
        (tokens, heads_q, head_dim_v) in the dtype of q (under autocast, of the autocast dtype). A query with an empty
        span gives 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, before any work.
        NotImplementedError: what the backend cannot run, with every reason.
    """
    return packed_attention_with_lse(
        q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
        alibi_anchors=alibi_anchors, dropout_p=dropout_p, backend=backend,
    )[0]  # fmt: skip


def packed_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PackedMask,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    alibi_anchors: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """As packed_attention, and the log-sum-exp of each query's scores (sinks included), differentiable too.

    Returns:
        out as packed_attention; lse (heads_q, tokens), float32, natural log, -inf for an empty span without sink.
    """
    if all(isinstance(x, Tensor) for x in (q, k, v)) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype.is_floating_point and x.dtype != torch.float64 else x for x in (q, k, v))
    _check(q, k, v, mask, sinks)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else real("softmax_scale", softmax_scale, _LEAST, _MOST)
    softcap = real("softcap", softcap, _LEAST, _MOST, none=0)
    dropout_p = real("dropout_p", dropout_p, 0, _MOST_DROPPED)
    slopes, anchors = _bias(q, alibi_slopes, alibi_anchors)
    if backend is None:
        backend = default_backend(q.device, q.dtype)
    _check_backend(backend, q)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if sinks is not None:
        sinks = sinks.to(ops.lse_dtype(q))
    q, k, v = (_last_dim_contiguous(x) for x in (q, k, v))
    options = (scale, softcap, dropout_p, backend)
    order = _tiles_in_order(mask.order, q, k, v)
    out, lse = PackedAttention.apply(q, k, v, *mask[:4], order, sinks, slopes, anchors, seed, *options)
    return out, lse


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _check_mask(mask: object) -> None:
    if not isinstance(mask, PackedMask):
        raise TypeError(
            f"mask must be a packattn.PackedMask, got {described(mask)}; make one with "
            "PackedMask.causal(packattn.boundaries(position_ids))."
        )
    # By their places: older compilers do not trace what else a NamedTuple has.
    for name, ends, start in (
        ("k_start", mask[0], mask[0]), ("k_end", mask[1], mask[0]), ("q_start", mask[2], mask[2]),
        ("q_end", mask[3], mask[2]),
    ):  # fmt: skip
        if not isinstance(ends, Tensor) or ends.dtype != torch.int32 or ends.ndim != 1 or ends.shape != start.shape:
            raise ValueError(
                f"mask.{name} must be an int32 tensor of one dimension, as those that PackedMask.from_spans makes, got "
                f"{described(ends)}."
            )


def check_tensors(q: object, k: object, v: object) -> None:
    """Refuse what is not a floating-point tensor of three dimensions."""
    for name, x, shape in (
        ("q", q, "(tokens, heads_q, head_dim)"),
        ("k", k, "(tokens_k, heads_k, head_dim)"),
        ("v", v, "(tokens_k, heads_k, head_dim_v)"),
    ):
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor of shape {shape}, got {described(x)}.")
        if x.ndim != 3:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}.")


def check_sinks(name: str, sinks: object, q: Tensor) -> None:
    """Refuse what is neither None nor one logit per head."""
    if sinks is not None and (
        not isinstance(sinks, Tensor)
        or not sinks.dtype.is_floating_point
        or sinks.shape != (q.shape[1],)
        or sinks.device != q.device
    ):
        raise ValueError(
            f"{name} must be a floating-point tensor of shape ({q.shape[1]},) on {q.device}, got {described(sinks)}."
        )


def _check(q: Tensor, k: Tensor, v: Tensor, mask: PackedMask, sinks: Tensor | None) -> None:
    check_tensors(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}.")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}.")
    tokens, heads_q, head_dim = q.shape
    tokens_k, heads_k, _ = k.shape
    if 0 in (heads_q, head_dim, v.shape[2]):
        raise ValueError(f"heads and head_dim must be at least 1, got q {tuple(q.shape)} and v {tuple(v.shape)}.")
    if k.shape[2] != head_dim or heads_k == 0 or heads_q % heads_k:
        raise ValueError(
            f"k must have shape (tokens_k, heads_k, head_dim={head_dim}) with heads_k dividing heads_q={heads_q}, got "
            f"{tuple(k.shape)}."
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must have shape ({tokens_k}, {heads_k}, head_dim_v), as k, got {tuple(v.shape)}.")
    _check_mask(mask)
    # By its fields: older compilers do not trace the properties of a NamedTuple.
    queries, keys = mask.k_start.shape[0], mask.q_start.shape[0]
    if queries != tokens or keys != tokens_k:
        raise ValueError(f"mask must be of {tokens} queries and {tokens_k} keys, as q and k, got {queries} and {keys}.")
    if mask.k_start.device != q.device:
        raise ValueError(f"mask must be on the device of q, {q.device}, got {mask.k_start.device}.")
    check_sinks("sinks", sinks, q)


def _bias(q: Tensor, alibi_slopes: Tensor | None, alibi_anchors: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Slopes (heads_q, tokens) without a copy and anchors, as the operators take them."""
    tokens, heads, _ = q.shape
    if alibi_slopes is None:
        if alibi_anchors is not None:
            raise ValueError("alibi_anchors must come with alibi_slopes, got alibi_slopes=None.")
        return None, None
    if (
        not isinstance(alibi_slopes, Tensor)
        or not alibi_slopes.dtype.is_floating_point
        or alibi_slopes.shape not in ((heads,), (heads, tokens))
        or alibi_slopes.device != q.device
    ):
        raise ValueError(
            f"alibi_slopes must be a floating-point tensor of shape ({heads},) or ({heads}, {tokens}) on {q.device}, "
            f"got {described(alibi_slopes)}."
        )
    if alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient, which packed_attention does not give; detach it.")
    slopes = alibi_slopes.to(ops.lse_dtype(q)).reshape(heads, -1).expand(heads, tokens)
    if alibi_anchors is None:
        return slopes, torch.arange(tokens, dtype=torch.int32, device=q.device)
    if (
        not isinstance(alibi_anchors, Tensor)
        or alibi_anchors.shape != (tokens,)
        or alibi_anchors.dtype != torch.int32
        or alibi_anchors.device != q.device
    ):
        got = described(alibi_anchors)
        raise ValueError(f"alibi_anchors must be int32 of shape ({tokens},) on {q.device}, got {got}.")
    return slopes, alibi_anchors.contiguous()


def _check_backend(backend: str, q: Tensor) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}.")
    reasons = []
    if backend == "cpu":
        if not ops.HAS_C:
            reasons.append(f"packattn._C is not built: {how_to_build('a C++ compiler')}")
        if q.device.type != "cpu":
            reasons.append(f"the tensors are on {q.device}")
        if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            reasons.append(f"{q.dtype} is not one of float32, bfloat16, float16")
    if backend == "triton" and q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"{q.dtype} is not one of float32, bfloat16, float16")
    if reasons:
        raise NotImplementedError(f'backend "{backend}" cannot run this: {"; ".join(reasons)}. Use backend="torch".')
