"""Forward pass: flash attention over spans. Equation numbers are those of docs/kernel.md.

    s_ij = scale * q_i . k_j                                                                      (2)
    p_ij = exp(s_ij - lse_i) where k_start_i <= j < k_end_i, else 0                               (1), (5)
    out_i = sum_j p_ij v_j          lse_i = log sum_j exp(s_ij)                                   (5), (6)

A program owns BLOCK_M rows of the packed stream and one key head: row r is token r // GROUP with query head r % GROUP
of the GROUP that read this key head. So short sequences fill the tile, and K and V are read once for the group. A tile
may begin within a token and straddle sequences. Its keys are visited in two loops with one body:

    without a mask   keys that all rows see; or, in a tile with several sequences, the keys before the second one,
                     which the rows of the first all see: the other rows are reset to nothing afterwards
    with the mask    the rest: the diagonal, the edge of a window, what is left over of a block

m_i  running maximum of a row's scores, base 2      l_i  running sum of exp2(s - m_i)
acc  running sum of exp2(s - m_i) v                 n    first key of a block of BLOCK_N

m and 1 / l stay beside lse for the backward pass (13).

Another number of tokens compiles no kernel anew: what batches change is not specialised on, nor how the order of the
tiles lies in memory, a slice that begins where the orders of other passes end.
"""

import triton
import triton.language as tl

from packattn.kernels.tile import (
    LN2,
    LOG2E,
    NEVER,
    add_dot,
    dot_transposed,
    in_registers,
    keep_mask,
    keep_rows,
    load_tile,
    program_tile,
    scale_tile,
    scores,
    store_tile,
    unmasked_blocks,
    visible,
    zero_tile,
)  # fmt: skip


@triton.jit
def _attend(
    acc, m_i, l_i, q, rows, keys, options, lo, hi, gap, gap_length, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, PARTS_V: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [lo, hi) in blocks; with MASKED, of which [gap, gap + gap_length) are left out."""
    token, head, row_start, row_end, slope, anchor = rows
    k_base, v_base, stride_kt, stride_vt, tokens_k = keys
    scale, softcap, seed, threshold, keep_scale = options
    offs_n = tl.arange(0, BLOCK_N)
    for block in tl.range(lo, hi, BLOCK_N):
        n = block
        if MASKED:
            n += tl.where(block >= gap, gap_length, 0)
        key = n + offs_n
        at = tl.cast(n, tl.int64)
        k = load_tile(k_base + at * stride_kt, offs_n, stride_kt, key < tokens_k, HEAD_DIM, PARTS, MASKED)
        distance = anchor[:, None] - key[None, :]
        s, unit, _ = scores(
            dot_transposed(q, k, PRECISION), scale, softcap, slope[:, None], distance, HAS_SOFTCAP, HAS_ALIBI
        )
        if MASKED:
            s = tl.where(visible(row_start, row_end, key), s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * unit)  # m is in base 2, as s * unit; unit > 0
        # A row that has seen nothing yet has m = -inf; -inf - -inf would be NaN.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(s * unit - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        if HAS_DROPOUT:
            kept = keep_mask(seed, token[:, None], key[None, :], head[:, None], threshold)
            p = tl.where(kept, p * keep_scale, 0.0)
        v = load_tile(v_base + at * stride_vt, offs_n, stride_vt, key < tokens_k, HEAD_DIM_V, PARTS_V, MASKED)
        acc = add_dot(scale_tile(acc, alpha), p, v, PRECISION)
        m_i = m_new
    return acc, m_i, l_i


@triton.jit(
    do_not_specialize=["tokens", "tokens_k", "heads_k", "scale", "softcap", "threshold", "keep_scale"],
    do_not_specialize_on_alignment=["order_ptr"],
)
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, norm_ptr, k_start_ptr, k_end_ptr, order_ptr, sinks_ptr, slopes_ptr,
    anchors_ptr, seed_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_sh, stride_st, tokens, tokens_k, heads_k, scale, softcap, threshold, keep_scale, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM_V: tl.constexpr, PARTS_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    tile, head_k = program_tile(order_ptr, heads_k, HAS_ORDER)
    m0 = tile * BLOCK_M // GROUP
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)

    row = tile * BLOCK_M - m0 * GROUP + tl.arange(0, BLOCK_M)  # counted from the first head of token m0
    token = m0 + row // GROUP
    head = head_k * GROUP + row % GROUP
    inside = token < tokens
    at, head0 = tl.cast(m0, tl.int64), tl.cast(head_k, tl.int64) * GROUP
    q_rows = row // GROUP * stride_qt + tl.cast(row % GROUP, tl.int64) * stride_qh
    q = load_tile(q_ptr + at * stride_qt + head0 * stride_qh, q_rows, 1, inside, HEAD_DIM, PARTS, True)
    q = in_registers(q, HELD)
    # Rows outside see nothing and are never stored.
    row_start = tl.load(k_start_ptr + token, mask=inside, other=NEVER)
    row_end = tl.load(k_end_ptr + token, mask=inside, other=0)
    slope, anchor = tl.zeros([BLOCK_M], tl.float32), token
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + tl.cast(head, tl.int64) * stride_sh + token * stride_st, mask=inside, other=0.0)
        anchor = tl.load(anchors_ptr + token, mask=inside, other=0)

    # Both ends never decrease: the first and the last token bound what the tile visits and what all its rows see.
    lo, hi = tl.load(k_start_ptr + m0), tl.load(k_end_ptr + last)
    begin, end = tl.load(k_start_ptr + last), tl.load(k_end_ptr + m0)
    kept = (row_start == lo) | (begin < end)  # after the loop without a mask; the other rows start anew
    if begin >= end:  # no key is seen by all rows: take those before the rows that do not begin at lo
        begin, end = lo, tl.minimum(end, tl.min(tl.where(row_start > lo, row_start, NEVER)))
    first, second = unmasked_blocks(lo, begin, end, BLOCK_N)

    k_base = k_ptr + tl.cast(head_k, tl.int64) * stride_kh
    v_base = v_ptr + tl.cast(head_k, tl.int64) * stride_vh
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    rows = (token, head, row_start, row_end, slope, anchor)
    keys = (k_base, v_base, stride_kt, stride_vt, tokens_k)
    options = (scale, softcap, seed, threshold, keep_scale)

    acc = zero_tile(BLOCK_M, PARTS_V)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, rows, keys, options, first, second, 0, 0, HEAD_DIM, PARTS, HEAD_DIM_V, PARTS_V, BLOCK_N,
        HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION, False,
    )  # fmt: skip
    acc = keep_rows(acc, kept)
    m_i, l_i = tl.where(kept, m_i, float("-inf")), tl.where(kept, l_i, 0.0)
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, rows, keys, options, lo, hi - (second - first), first, second - first, HEAD_DIM, PARTS,
        HEAD_DIM_V, PARTS_V, BLOCK_N, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip

    if HAS_SINKS:  # one more logit in the sum, without a value (7)
        sink = tl.load(sinks_ptr + head, mask=inside, other=0.0) * LOG2E
        m_new = tl.maximum(m_i, sink)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        acc = scale_tile(acc, alpha)
        l_i = l_i * alpha + tl.exp2(sink - shift)
        m_i = m_new
    # A row without keys and sink has l = 0: out = 0, lse = -inf, and m = inf makes its p 0 in the backward pass.
    inverse = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)
    where = tl.cast(head, tl.int64) * tokens + token
    tl.store(lse_ptr + where, (m_i + tl.log2(l_i)) * LN2, mask=inside)
    tl.store(norm_ptr + where, tl.where(l_i == 0.0, float("inf"), m_i), mask=inside)
    tl.store(norm_ptr + where + tl.cast(heads_k, tl.int64) * GROUP * tokens, inverse, mask=inside)
    out_rows = row // GROUP * stride_ot + tl.cast(row % GROUP, tl.int64) * stride_oh
    out_base = out_ptr + at * stride_ot + head0 * stride_oh
    store_tile(out_base, out_rows, 1, inside, acc, inverse, HEAD_DIM_V, PARTS_V)
