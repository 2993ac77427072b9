"""Forward pass.

    s_ij = scale * q_i . k_j        p_ij = exp(s_ij - lse_i) for k_start_i <= j < k_end_i, else 0
    out_i = sum_j p_ij v_j          lse_i = log sum_j exp(s_ij)

Grid: (token tiles, key heads). A program owns TILE_TOKENS = BLOCK_M // GROUP tokens with all GROUP query heads
that read its key head: row r is token m0 + r // GROUP, head r % GROUP. So short sequences fill the tile, and K and V
are read once for the group. Tiles lie over the packed stream and may straddle sequences; the spans say what to visit.

m_i  running maximum of a row's scores, base 2      l_i  running sum of exp2(s - m_i)
acc  running sum of exp2(s - m_i) v                 n    first key of a block of BLOCK_N
"""

import triton
import triton.language as tl

from packattn.kernels.tile import LN2, LOG2E, capped_scores, keep_mask, load_tile, split_range, visible


@triton.jit
def _attend(
    acc, m_i, l_i, q, k_base, v_base, stride_kt, stride_vt, row_start, row_end, token, head, lo, hi, tokens_k, scale,
    softcap, seed, threshold, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [lo, hi) in blocks of BLOCK_N; without MASKED every row sees every key."""
    offs_n = tl.arange(0, BLOCK_N)
    for n in tl.range(lo, hi, BLOCK_N):
        key = n + offs_n
        at = tl.cast(n, tl.int64)
        # [BLOCK_N, BLOCK_D]
        k = load_tile(k_base + at * stride_kt, offs_n, stride_kt, key < tokens_k, HEAD_DIM, BLOCK_D, MASKED)
        s, _ = capped_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, HAS_SOFTCAP)
        if MASKED:
            s = tl.where(visible(row_start, row_end, key), s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # A row that has seen nothing yet has m = -inf; -inf - -inf would be NaN.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        if HAS_DROPOUT:
            kept = keep_mask(seed, token[:, None], key[None, :], head[:, None], threshold)
            p = tl.where(kept, p * keep_scale, 0.0)
        # [BLOCK_N, BLOCK_DV]
        v = load_tile(v_base + at * stride_vt, offs_n, stride_vt, key < tokens_k, HEAD_DIM_V, BLOCK_DV, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    return acc, m_i, l_i


@triton.jit(do_not_specialize=["tokens", "tokens_k", "scale", "softcap", "threshold", "keep_scale"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_start_ptr, k_end_ptr, sinks_ptr, seed_ptr, stride_qt, stride_qh,
    stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, tokens, tokens_k, scale, softcap, threshold,
    keep_scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILE_TOKENS: tl.constexpr = BLOCK_M // GROUP
    m0 = tl.program_id(0) * TILE_TOKENS
    last = tl.minimum(m0 + TILE_TOKENS, tokens) - 1
    head_k = tl.program_id(1)

    row = tl.arange(0, BLOCK_M)
    token = m0 + row // GROUP
    head = head_k * GROUP + row % GROUP
    inside = (row < TILE_TOKENS * GROUP) & (token <= last)
    q_rows = row // GROUP * stride_qt + row % GROUP * stride_qh
    q_base = q_ptr + tl.cast(m0, tl.int64) * stride_qt + tl.cast(head_k, tl.int64) * GROUP * stride_qh
    # [BLOCK_M, BLOCK_D]; rows outside are zero, see nothing where masks are, and are never stored.
    q = load_tile(q_base, q_rows, 1, inside, HEAD_DIM, BLOCK_D, True)
    row_start = tl.load(k_start_ptr + token, mask=inside, other=0)
    row_end = tl.load(k_end_ptr + token, mask=inside, other=0)

    # Both ends never decrease, so the tile's first and last token bound what to visit and what all rows see.
    lo, hi = tl.load(k_start_ptr + m0), tl.load(k_end_ptr + last)
    first, second = split_range(lo, hi, tl.load(k_start_ptr + last), tl.load(k_end_ptr + m0), BLOCK_N)
    k_base = k_ptr + tl.cast(head_k, tl.int64) * stride_kh
    v_base = v_ptr + tl.cast(head_k, tl.int64) * stride_vh
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, k_base, v_base, stride_kt, stride_vt, row_start, row_end, token, head, lo, first, tokens_k,
        scale, softcap, seed, threshold, keep_scale, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_N, HAS_SOFTCAP,
        HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, k_base, v_base, stride_kt, stride_vt, row_start, row_end, token, head, first, second,
        tokens_k, scale, softcap, seed, threshold, keep_scale, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_N,
        HAS_SOFTCAP, HAS_DROPOUT, PRECISION, False,
    )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, k_base, v_base, stride_kt, stride_vt, row_start, row_end, token, head, second, hi, tokens_k,
        scale, softcap, seed, threshold, keep_scale, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_N, HAS_SOFTCAP,
        HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip

    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=inside, other=0.0) * LOG2E
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        acc = acc * alpha[:, None]
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        m_i = m_new
    # A row without keys and sink has l = 0: out = 0, lse = -inf.
    out = acc * (1.0 / tl.where(l_i == 0.0, 1.0, l_i))[:, None]
    lse = (m_i + tl.log2(l_i)) * LN2
    tl.store(lse_ptr + tl.cast(head, tl.int64) * tokens + token, lse, mask=inside)
    d = tl.arange(0, BLOCK_DV)
    o_rows = row // GROUP * stride_ot + row % GROUP * stride_oh
    o_base = out_ptr + tl.cast(m0, tl.int64) * stride_ot + tl.cast(head_k, tl.int64) * GROUP * stride_oh
    tl.store(
        o_base + o_rows[:, None] + d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < HEAD_DIM_V),
    )
