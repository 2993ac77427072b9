"""The oracle: packed attention written the obvious way, dense, under plain autograd. For tests and small inputs."""

import torch
from torch import Tensor

from packattn import dropout
from packattn.mask import PackedMask


def attention(
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
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense packed attention in the dtype of q (any floating dtype), every step in that dtype.

    Args:
        q: (tokens, heads_q, head_dim). k: (tokens_k, heads_k, head_dim). v: (tokens_k, heads_k, head_dim_v).
        alibi_slopes: (heads_q,) or (heads_q, tokens). alibi_anchors: (tokens,), by default 0, 1, 2, ...
        seed: int64 (1,), needed with dropout_p > 0.

    Returns:
        out (tokens, heads_q, head_dim_v) and lse (heads_q, tokens), natural log, both in the dtype of q.
    """
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        query, key = (torch.arange(n, device=q.device) for n in scores.shape[1:])
        anchors = query if alibi_anchors is None else alibi_anchors
        slopes = alibi_slopes.to(q.dtype).reshape(q.shape[1], -1, 1)
        scores = scores - slopes * (anchors[:, None] - key).abs()
    visible = mask.to_dense()
    scores = scores.masked_fill(~visible, float("-inf"))
    columns = scores
    if sinks is not None:
        columns = torch.cat([scores, sinks.to(q.dtype)[:, None, None].expand(-1, q.shape[0], 1)], -1)
    lse = torch.logsumexp(columns, -1)
    # A query without keys has lse = -inf; its row of probabilities is 0, not NaN.
    finite = torch.where(torch.isneginf(lse), 0.0, lse)
    p = torch.exp(scores - finite[..., None]).masked_fill(~visible, 0.0)
    if dropout_p > 0:
        assert seed is not None
        head, query, key = (torch.arange(n, device=q.device) for n in p.shape)
        kept = dropout.keep(seed, query[:, None], key, head[:, None, None], dropout_p)
        p = p * kept / (1 - dropout_p)
    return torch.einsum("hij,jhd->ihd", p.to(q.dtype), values), lse
