"""flash_attn_varlen_func: packattn behind the signature of flash-attn, so that code written for it runs anywhere."""

import torch
from torch import Tensor

from packattn.attention import described, packed_attention_with_lse
from packattn.mask import PackedMask


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of sequences that lie end to end, with the signature and semantics of flash-attn's function.

    Query i of a sequence stands at key `i + len_k - len_q`: a causal mask and the windows are aligned to the bottom
    right. Any device and any dtype of `packed_attention`; nothing is read back to the host.

    Args:
        q: (total_q, heads_q, head_dim). k: (total_k, heads_k, head_dim). v: (total_k, heads_k, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where each sequence begins, and the end of the last. Queries
            before the first sequence and after the last get 0.
        max_seqlen_q, max_seqlen_k: not needed; taken so that calls need no change.
        dropout_p, softmax_scale, softcap: as in `packed_attention`.
        causal: each query sees no key after its own place.
        window_size: keys visible to the (left, right) of a query's place; -1: all.
        alibi_slopes: (heads_q,) or (batch, heads_q): a bias `-slope * |i + len_k - len_q - j|`.
        deterministic: results are deterministic either way.
        return_attn_probs: return the log-sum-exp too.
        block_table: paged keys and values are not supported.

    Returns:
        out (total_q, heads_q, head_dim_v), or (out, lse, None) with lse (heads_q, total_q), float32, -inf where a query
        sees nothing; the probabilities, which flash-attn returns third for its tests, are never made.

    Raises:
        NotImplementedError: block_table is given.
        TypeError, ValueError: an argument that does not fit, named.
    """
    if block_table is not None:
        raise NotImplementedError("block_table (paged keys and values) is not supported; give contiguous k and v.")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if (
            not isinstance(cu_seqlens, Tensor)
            or cu_seqlens.ndim != 1
            or cu_seqlens.numel() < 1
            or cu_seqlens.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(f"{name} must be an integer tensor of shape (batch + 1,), got {described(cu_seqlens)}.")
        if cu_seqlens.shape != cu_seqlens_q.shape or cu_seqlens.device != q.device:
            raise ValueError(
                f"{name} must have shape {tuple(cu_seqlens_q.shape)} on {q.device}, got {tuple(cu_seqlens.shape)} on "
                f"{cu_seqlens.device}."
            )
    left, right = (int(size) for size in window_size)
    if min(left, right) < -1:
        raise ValueError(f"window_size must hold two numbers of at least -1, got {(left, right)}.")
    batch = cu_seqlens_q.numel() - 1
    query = torch.arange(q.shape[0], dtype=cu_seqlens_q.dtype, device=q.device)
    # 1 + its sequence; before the first and after the last there is a sequence without queries and keys.
    sequence = torch.searchsorted(cu_seqlens_q, query, right=True)
    edges_q, edges_k = (torch.cat([cu[:1], cu, cu[-1:]]) for cu in (cu_seqlens_q, cu_seqlens_k))
    begin_q, end_q = edges_q[sequence], edges_q[sequence + 1]
    begin, end = edges_k[sequence], edges_k[sequence + 1]
    place = begin + (query - begin_q) + (end - begin) - (end_q - begin_q)
    k_start = begin if left < 0 else torch.minimum(torch.maximum(begin, place - left), end)
    k_end = end
    if causal or right >= 0:
        reach = place + 1 if causal else place + right + 1
        k_end = torch.maximum(torch.minimum(end, reach), k_start)
    mask = PackedMask.from_spans(k_start.int(), k_end.int(), k.shape[0])
    slopes = alibi_slopes
    if slopes is not None and slopes.ndim == 2:
        if slopes.shape != (batch, q.shape[1]):
            raise ValueError(
                f"alibi_slopes must have shape ({q.shape[1]},) or ({batch}, {q.shape[1]}), got {tuple(slopes.shape)}."
            )
        slopes = slopes[(sequence - 1).clamp(0, batch - 1)].T
    out, lse = packed_attention_with_lse(
        q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=slopes,
        alibi_anchors=None if slopes is None else place.int(), dropout_p=dropout_p,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out
