"""Pieces of a tile that all passes share, each written once.

A tile of scores is [rows, columns]; in the forward and dQ kernels the rows are queries, in dK/dV they are keys. Scores
are in base 2: exp(x) = exp2(x * LOG2E), and the softmax scale is folded into the same factor.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible(start, end, columns):
    """Which columns each row sees: [ROWS], [ROWS], [COLUMNS] -> [ROWS, COLUMNS]."""
    return (start[:, None] <= columns[None, :]) & (columns[None, :] < end[:, None])


@triton.jit
def load_tile(base, index, stride, in_bounds, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows `index` of a matrix with row stride `stride`: [ROWS, BLOCK_DIM], zero outside."""
    d = tl.arange(0, BLOCK_DIM)
    pointers = base + index[:, None] * stride + d[None, :]
    if MASKED:
        if DIM == BLOCK_DIM:
            return tl.load(pointers, mask=in_bounds[:, None], other=0.0)
        return tl.load(pointers, mask=in_bounds[:, None] & (d[None, :] < DIM), other=0.0)
    if DIM == BLOCK_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=d[None, :] < DIM, other=0.0)


@triton.jit
def tanh(x):
    """tanh by exp2 (the interpreter has no libdevice), by its series near 0 where 1 - 2 / (e^2x + 1) cancels."""
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    y = x * x
    near = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 - y * (1382 / 155925))))))
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def capped_scores(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Products of queries and keys -> scores in base 2, and the derivative of the cap (1 without one)."""
    if HAS_SOFTCAP:
        t = tanh(products * (scale / softcap))
        scores, slope = t * (softcap * LOG2E), 1.0 - t * t
    else:
        scores, slope = products * (scale * LOG2E), 1.0
    return scores, slope


@triton.jit
def keep_mask(seed, query, key, head, threshold):
    """Which scores dropout keeps (packattn/dropout.py): broadcast shape of the int32 indices query, key and head."""
    query, key = tl.broadcast(query.to(tl.uint32, bitcast=True), key.to(tl.uint32, bitcast=True))
    head = (query * 0) + head.to(tl.uint32, bitcast=True)
    word, _, _, _ = tl.philox(seed, query, key, head, query * 0)
    return word >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def split_range(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Cut [lo, hi) in steps of BLOCK from lo: masked up to the first bound, unmasked up to the second, masked after.

    Between full_lo and full_hi, if there is anything, every row of the tile sees every column.
    """
    first = lo + tl.cdiv(tl.maximum(full_lo - lo, 0), BLOCK) * BLOCK
    first = tl.minimum(first, lo + tl.cdiv(hi - lo, BLOCK) * BLOCK)
    second = first + tl.maximum(full_hi - first, 0) // BLOCK * BLOCK
    return first, second
