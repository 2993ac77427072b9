"""Attention of the FlashAttention-2 kind, to compare with: a tile of one sequence and head, a mask in every block.

The grid is ceil(longest / BLOCK) tiles for every head of every sequence, most of which end at once where lengths
differ. The backward pass is one kernel over tiles of keys; its dQ goes to a float32 buffer by atomic additions.
Shapes as in flash_attn_varlen_func, contiguous: q (tokens, heads, D), k and v (tokens, heads / GROUP, D).
"""

import triton
import triton.language as tl


@triton.jit
def plain_forward(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_ptr, tokens, heads, scale, GROUP: tl.constexpr,
                  D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    m0, head, sequence = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_ptr + sequence)
    length = tl.load(cu_ptr + sequence + 1) - start
    if m0 >= length:
        return
    m, n, d = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    row, row_k = heads * D, heads // GROUP * D
    inside = (m < length)[:, None]
    at = (start + m)[:, None] * row + head * D + d[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    k_base = start * row_k + head // GROUP * D
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for n0 in tl.range(0, tl.minimum(m0 + BLOCK_M, length), BLOCK_N):
        key = n0 + n
        keys = k_base + key[:, None] * row_k + d[None, :]
        k = tl.load(k_ptr + keys, mask=(key < length)[:, None], other=0.0)
        s = tl.dot(q, k.T)
        s = tl.where((key[None, :] <= m[:, None]) & (key < length)[None, :], s, float("-inf"))
        new = tl.maximum(peak, tl.max(s, 1) * (scale * 1.44269504))
        p = tl.exp2(s * (scale * 1.44269504) - new[:, None])
        alpha = tl.exp2(peak - new)
        total = total * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + keys, mask=(key < length)[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        peak = new
    tl.store(out_ptr + at, (acc / total[:, None]).to(q.dtype), mask=inside)
    tl.store(lse_ptr + head * tokens + start + m, (peak + tl.log2(total)) * 0.69314718, mask=m < length)


@triton.jit
def plain_backward(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, cu_ptr, tokens, heads,
                   scale, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr):  # fmt: skip
    """dk and dv have `heads` heads, to be summed over the groups afterwards."""
    n0, head, sequence = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_ptr + sequence)
    length = tl.load(cu_ptr + sequence + 1) - start
    if n0 >= length:
        return
    n, m, d = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, D)
    row, row_k = heads * D, heads // GROUP * D
    inside = (n < length)[:, None]
    keys = (start + n)[:, None] * row_k + head // GROUP * D + d[None, :]
    k, v = tl.load(k_ptr + keys, mask=inside, other=0.0), tl.load(v_ptr + keys, mask=inside, other=0.0)
    dk, dv = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, D], tl.float32)
    for m0 in tl.range(n0 // BLOCK_M * BLOCK_M, length, BLOCK_M):
        query = m0 + m
        some = query < length
        at = (start + query)[:, None] * row + head * D + d[None, :]
        q = tl.load(q_ptr + at, mask=some[:, None], other=0.0)
        dout = tl.load(dout_ptr + at, mask=some[:, None], other=0.0)
        lse = tl.load(lse_ptr + head * tokens + start + query, mask=some, other=float("inf"))
        delta = tl.load(delta_ptr + head * tokens + start + query, mask=some, other=0.0)
        s = tl.dot(k, q.T) * scale
        seen = (n[:, None] <= query[None, :]) & (n < length)[:, None]
        p = tl.where(seen, tl.exp2((s - lse[None, :]) * 1.44269504), 0.0)
        dv = tl.dot(p.to(q.dtype), dout, dv)
        ds = (p * (tl.dot(v, dout.T) - delta[None, :]) * scale).to(q.dtype)
        dk = tl.dot(ds, q, dk)
        tl.atomic_add(dq_ptr + at, tl.dot(ds.T, k), mask=some[:, None], sem="relaxed")
    grads = (start + n)[:, None] * row + head * D + d[None, :]
    tl.store(dk_ptr + grads, dk.to(k.dtype), mask=inside)
    tl.store(dv_ptr + grads, dv.to(v.dtype), mask=inside)
