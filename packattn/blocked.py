"""The `torch` backend: packed attention in plain torch, any device and floating dtype, memory linear in the tokens.

Queries are taken in blocks of 64, each against its keys at once, so that scratch is a few times 64 / head_dim of q.
Arithmetic is float32, or float64 for float64 inputs. On the CPU a block reads only the keys that it sees; elsewhere
that would wait for the device, so a block reads all keys and the mask does the rest.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from packattn import dropout
from packattn.ops import lse_dtype

_BLOCK = 64


def _without_autocast(
    function: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """An operator computes in the precision it states, also inside `torch.autocast`."""

    @functools.wraps(function)
    def call(first: Tensor, *others: Tensor | float | None) -> tuple[Tensor, ...]:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *others)

    return call


class _Scores:
    """Scores and probabilities of one block of queries; shared by both passes."""

    def __init__(
        self, q: Tensor, k: Tensor, k_start: Tensor, k_end: Tensor, rows: slice, keys: slice, softmax_scale: float,
        softcap: float, alibi_slopes: Tensor | None, anchors: Tensor | None, seed: Tensor | None, dropout_p: float,
    ) -> None:  # fmt: skip
        dtype = lse_dtype(q)
        tokens, heads, _ = q[rows].shape
        heads_k = k.shape[1]
        # Queries [heads_k, group * tokens, head_dim] against keys [heads_k, keys, head_dim].
        self.q = self.rows_by_head(q[rows].to(dtype), heads_k)
        self.k = k[keys].to(dtype).transpose(0, 1)
        raw = (self.q @ self.k.transpose(1, 2) * softmax_scale).view(heads, tokens, self.k.shape[1])
        self.slope: Tensor | float = 1.0
        if softcap > 0:
            capped = torch.tanh(raw / softcap)
            raw, self.slope = capped * softcap, 1 - capped * capped
        key = torch.arange(keys.start, keys.stop, device=q.device)
        if alibi_slopes is not None and anchors is not None:
            raw = raw - alibi_slopes[:, rows, None].to(dtype) * (anchors[rows, None] - key).abs()
        visible = (k_start[rows, None] <= key) & (key < k_end[rows, None])
        self.scores = raw.masked_fill(~visible, float("-inf"))
        self.kept: Tensor | float = 1.0
        if seed is not None:
            query, head = (torch.arange(a, b, device=q.device) for a, b in ((rows.start, rows.stop), (0, heads)))
            bits = dropout.keep(seed, query[:, None], key, head[:, None, None], dropout_p)
            self.kept = bits / (1 - dropout_p)

    def rows_by_head(self, x: Tensor, heads_k: int) -> Tensor:
        """(tokens, heads_q, dim) to [heads_k, group * tokens, dim]."""
        return x.transpose(0, 1).reshape(heads_k, -1, x.shape[2])

    def probabilities(self, lse: Tensor) -> Tensor:
        """exp(scores - lse): [heads_q, tokens, keys]; rows without keys are 0."""
        finite = torch.where(torch.isneginf(lse), 0.0, lse)
        return torch.exp(self.scores - finite[..., None])

    def stack(self, x: Tensor) -> Tensor:
        """[heads_q, tokens, keys] to [heads_k, group * tokens, keys]."""
        heads_k = self.k.shape[0]
        return x.reshape(heads_k, x.shape[0] // heads_k * x.shape[1], x.shape[2])


def _blocks(k_start: Tensor, k_end: Tensor, tokens_k: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with a range of keys that holds all it sees."""
    tokens = k_start.numel()
    for m0 in range(0, tokens, _BLOCK):
        m1 = min(m0 + _BLOCK, tokens)
        on_host = k_start.device.type == "cpu"
        yield slice(m0, m1), slice(int(k_start[m0]), int(k_end[m1 - 1])) if on_host else slice(0, tokens_k)


def _tokens_first(x: Tensor, rows: slice) -> Tensor:
    """[heads_k, group * tokens, dim] to (tokens, heads_q, dim)."""
    return x.reshape(-1, rows.stop - rows.start, x.shape[2]).transpose(0, 1)


@_without_autocast
def forward(
    q: Tensor, k: Tensor, v: Tensor, k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor,
    order: Tensor | None, sinks: Tensor | None, alibi_slopes: Tensor | None, anchors: Tensor | None,
    seed: Tensor | None, softmax_scale: float, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator `attention_forward_torch`; arguments as in `packattn.schemas`."""
    dtype = lse_dtype(q)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=dtype)
    bias_and_seed = (alibi_slopes, anchors, seed)
    for rows, keys in _blocks(k_start, k_end, k.shape[0]):
        block = _Scores(q, k, k_start, k_end, rows, keys, softmax_scale, softcap, *bias_and_seed, dropout_p)
        lse[:, rows] = block.scores.logsumexp(-1)
        if sinks is not None:
            lse[:, rows] = torch.logaddexp(lse[:, rows], sinks.to(dtype)[:, None])
        p = block.probabilities(lse[:, rows]) * block.kept
        out[rows] = _tokens_first(block.stack(p) @ v[keys].to(dtype).transpose(0, 1), rows).to(q.dtype)
    return out, lse, lse.new_empty(0)


@_without_autocast
def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, norm: Tensor,
    k_start: Tensor, k_end: Tensor, q_start: Tensor, q_end: Tensor, order: Tensor | None, sinks: Tensor | None,
    alibi_slopes: Tensor | None, anchors: Tensor | None, seed: Tensor | None, softmax_scale: float, softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator `attention_backward_torch`; arguments as in `packattn.schemas`."""
    dtype, heads_k = lse_dtype(q), k.shape[1]
    dq = q.new_empty(q.shape)
    dk, dv = k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    delta = torch.einsum("ihd,ihd->hi", out.to(dtype), dout.to(dtype))
    if dlse is not None:
        delta = delta - dlse
    bias_and_seed = (alibi_slopes, anchors, seed)
    for rows, keys in _blocks(k_start, k_end, k.shape[0]):
        block = _Scores(q, k, k_start, k_end, rows, keys, softmax_scale, softcap, *bias_and_seed, dropout_p)
        p = block.probabilities(lse[:, rows])
        do = block.rows_by_head(dout[rows].to(dtype), heads_k)
        dp = (do @ v[keys].to(dtype).permute(1, 2, 0)).view_as(p) * block.kept
        ds = block.stack(p * (dp - delta[:, rows, None]) * block.slope * softmax_scale)
        dq[rows] = _tokens_first(ds @ block.k, rows).to(q.dtype)
        dk[keys] += (ds.transpose(1, 2) @ block.q).transpose(0, 1)
        dv[keys] += (block.stack(p * block.kept).transpose(1, 2) @ do).transpose(0, 1)
    if sinks is None:
        dsinks = q.new_empty(0, dtype=dtype)
    else:  # a sink of -inf is none; where a query sees no key either, lse is -inf too
        lse = lse.clamp(min=torch.finfo(dtype).min)
        dsinks = -(torch.exp(sinks.to(dtype)[:, None] - lse) * delta).sum(1)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks
