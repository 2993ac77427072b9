"""flash-attn's functions for sequences that lie end to end, so that code written for them runs anywhere."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from packattn.arguments import INTEGERS, described, whole
from packattn.attention import check_sinks, check_tensors, packed_attention_with_lse
from packattn.boundaries import check_cu_seqlens
from packattn.mask import PackedMask

Result = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, None]

# How fast flash-attn 3 and 4 are, never what they give: taken, so that calls need no change.
_HINTS = (
    "num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "min_seqlen_k", "cu_total_m_blocks",
    "cu_total_n_blocks",
)  # fmt: skip
# What they can do and packattn cannot.
_REFUSED = {
    "block_table": "paged keys and values; give contiguous k and v",
    "page_table": "paged keys and values; give contiguous k and v",
    "qv": "a second product for the scores; concatenate qv to q, and what it meets to k",
    "q_descale": "8-bit tensors; give bfloat16 or float16",
    "k_descale": "8-bit tensors; give bfloat16 or float16",
    "v_descale": "8-bit tensors; give bfloat16 or float16",
    "attention_chunk": "chunks; use packattn.packed_attention with packattn.PackedMask.chunked",
    "score_mod": "scores by a function; packattn.packed_attention has softcap, sinks and ALiBi",
    "score_mod_bwd": "scores by a function; packattn.packed_attention has softcap, sinks and ALiBi",
    "mask_mod": "masks by a function; use packattn.packed_attention with a packattn.PackedMask",
    "block_sparse_tensors": "masks by blocks; use packattn.packed_attention with a packattn.PackedMask",
    "gather_kv_indices": "keys by index; gather k and v before the call",
    "aux_tensors": "scores and masks by a function; use packattn.packed_attention with a packattn.PackedMask",
    "aux_scalars": "scores and masks by a function; use packattn.packed_attention with a packattn.PackedMask",
    "out": "a tensor for the result; copy it there after the call",
}
_WIDE = 2**31  # a window as wide as any stream


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
    **others: Any,
) -> Result:
    """Attention of sequences that lie end to end, with the signature and semantics of flash-attn's function.

    Positional arguments are those of flash-attn 2; what 3 and 4 add is given by name. Query i of a sequence stands at
    key `i + len_k - len_q`: a causal mask and the windows are aligned to the bottom right. Any device and any dtype of
    `packed_attention`; nothing is read back to the host.

    Args:
        q: (total_q, heads_q, head_dim). k: (total_k, heads_k, head_dim). v: (total_k, heads_k, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (batch + 1,), where each sequence begins, and the end of the last.
            Queries before the first sequence and after the last get 0.
        max_seqlen_q, max_seqlen_k: not needed; taken so that calls need no change.
        dropout_p, softmax_scale, softcap: as in `packed_attention`.
        causal: each query sees no key after its own place.
        window_size: keys visible to the (left, right) of a query's place; -1 or None: all.
        alibi_slopes: (heads_q,) or (batch, heads_q): a bias `-slope * |i + len_k - len_q - j|`.
        deterministic: results are deterministic either way.
        return_attn_probs: return (out, lse, None), as flash-attn 2.
        block_table: paged keys and values are not supported.
        seqused_q, seqused_k: int32 or int64 (batch,): the tokens of each sequence that count, its first ones, as if
            there were no others. Queries beyond get 0, and keys beyond are not seen.
        learnable_sink: (heads_q,), floating: one logit per head that takes part in the softmax and has no value.
        return_lse: return (out, lse), as flash-attn 4.
        others: num_splits, pack_gqa, sm_margin, scheduler_metadata, min_seqlen_k, cu_total_m_blocks and
            cu_total_n_blocks, which change no result, are taken; the other arguments of flash-attn 3 and 4 are taken
            where they ask for nothing (None, and 0 for attention_chunk).

    Returns:
        out (total_q, heads_q, head_dim_v), alone or with lse (heads_q, total_q), float32, -inf where a query sees
        nothing. The probabilities, which flash-attn 2 returns third for its tests, are never made.

    Raises:
        NotImplementedError: block_table or another argument asks for what is not supported, by its name.
        TypeError, ValueError: an argument that does not fit, named.
        RuntimeError: cu_seqlens_q, cu_seqlens_k, seqused_q or seqused_k does not fit in its values, by an assertion on
            its device.
    """
    _refuse({"block_table": block_table, **others})
    if return_attn_probs and return_lse:
        raise ValueError("give return_attn_probs, for (out, lse, None), or return_lse, for (out, lse), not both.")
    check_tensors(q, k, v)
    check_sinks("learnable_sink", learnable_sink, q)
    begins_q, lengths_q = _sequences("q", cu_seqlens_q, seqused_q, q, cu_seqlens_q)
    begins_k, lengths_k = _sequences("k", cu_seqlens_k, seqused_k, k, cu_seqlens_q)
    left, right = _window(window_size)
    if causal:
        right = 0
    batch = cu_seqlens_q.numel() - 1
    query = torch.arange(q.shape[0], device=q.device)
    # 1 + its sequence; before the first and after the last there is a sequence without queries and keys.
    sequence = torch.searchsorted(begins_q[1:], query, right=True)
    begin, length = begins_k[sequence], lengths_k[sequence]
    index = query - begins_q[sequence]
    place = begin + index + length - lengths_q[sequence]
    k_start, end = begin, begin + length
    if left is not None:
        k_start = torch.minimum(torch.maximum(begin, place - left), end)
    k_end = end
    if right is not None:
        k_end = torch.maximum(torch.minimum(end, place + right + 1), k_start)
    if seqused_q is not None:
        k_start = torch.where(index < lengths_q[sequence], k_start, end)  # beyond, k_end is the end already
    mask = PackedMask.from_spans(k_start.int(), k_end.int(), k.shape[0])
    slopes = alibi_slopes
    if isinstance(slopes, Tensor) and slopes.ndim == 2:
        if slopes.shape != (batch, q.shape[1]) or slopes.device != q.device:
            raise ValueError(
                f"alibi_slopes must have shape ({q.shape[1]},) or ({batch}, {q.shape[1]}) on {q.device}, got "
                f"{described(slopes)}."
            )
        slopes = slopes[(sequence - 1).clamp(0, batch - 1)].T
    out, lse = packed_attention_with_lse(
        q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sinks=learnable_sink, alibi_slopes=slopes,
        alibi_anchors=None if slopes is None else place.int(), dropout_p=dropout_p,
    )  # fmt: skip
    if return_attn_probs:
        return out, lse, None
    return (out, lse) if return_lse else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Result:
    """`flash_attn_varlen_func` of keys and values in one tensor, as flash-attn's function of this name.

    Args:
        q: (total_q, heads_q, head_dim). kv: (total_k, 2, heads_k, head_dim), the keys first.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, named: as of `flash_attn_varlen_func`, in its
            order.

    Returns, Raises:
        As `flash_attn_varlen_func`; ValueError: kv is not such a tensor.
    """
    k, v = _unpacked("kv", kv, "(total_k, 2, heads_k, head_dim)", 2)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, **named)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor | None = None, *options: Any, **named: Any
) -> Result:
    """`flash_attn_varlen_func` of queries, keys and values in one tensor, as flash-attn's function of this name.

    Args:
        qkv: (total, 3, heads, head_dim), the queries first, the values last.
        cu_seqlens: int32 or int64 (batch + 1,), of the queries and of the keys.
        max_seqlen, options, named: as of `flash_attn_varlen_func`, in its order.

    Returns, Raises:
        As `flash_attn_varlen_func`; ValueError: qkv is not such a tensor.
    """
    q, k, v = _unpacked("qkv", qkv, "(total, 3, heads, head_dim)", 3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options, **named)


def _unpacked(name: str, packed: object, shape: str, parts: int) -> tuple[Tensor, ...]:
    if not isinstance(packed, Tensor) or packed.ndim != 4 or packed.shape[1] != parts:
        raise ValueError(f"{name} must be a tensor of shape {shape}, got {described(packed)}.")
    return packed.unbind(1)


def _refuse(others: dict[str, Any]) -> None:
    """Refuse arguments that ask for something, by their names."""
    for name, value in others.items():
        if name in _HINTS or (name in _REFUSED and (value is None or (name == "attention_chunk" and value == 0))):
            continue
        if name in _REFUSED:
            raise NotImplementedError(f"{name} is not supported: {_REFUSED[name]}.")
        raise TypeError(f"flash_attn_varlen_func has no argument {name!r}, and neither has flash-attn's.")


def _sequences(of: str, cu_seqlens: Tensor, used: Tensor | None, x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where each sequence begins, and its length, int64 (batch + 2,): with empty ones before the first and after the
    last."""
    name = f"cu_seqlens_{of}"
    check_cu_seqlens(name, cu_seqlens)
    if cu_seqlens.shape != like.shape or cu_seqlens.device != x.device:
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)} on {x.device}, got {tuple(cu_seqlens.shape)} on "
            f"{cu_seqlens.device}."
        )
    ends = cu_seqlens.long()
    lengths = ends.diff()
    fit = (lengths >= 0).all() & (ends[0] >= 0) & (ends[-1] <= x.shape[0])
    torch._assert_async(fit, f"{name} must never fall, and lie from 0 to the number of tokens of {of}.")
    if used is not None:
        if (
            not isinstance(used, Tensor)
            or used.dtype not in INTEGERS
            or used.shape != lengths.shape
            or used.device != x.device
        ):
            raise ValueError(
                f"seqused_{of} must be an integer tensor of shape ({lengths.numel()},) on {x.device}, got "
                f"{described(used)}."
            )
        fit = ((used >= 0) & (used <= lengths)).all()
        torch._assert_async(fit, f"seqused_{of} must be from 0 to the length of each sequence in {name}.")
        lengths = used.long()
    none = lengths.new_zeros(1)
    return torch.cat([ends[:1], ends]), torch.cat([none, lengths, none])


def _window(window_size: object) -> tuple[int | None, int | None]:
    """Keys to the left and to the right of a query's place, None for all."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size must hold two numbers, (left, right), got {described(window_size)}.")
    sizes = [-1 if size is None else whole("window_size", size, -1) for size in window_size]
    left, right = (None if size < 0 else min(size, _WIDE) for size in sizes)
    return left, right
