"""Backward pass, in three kernels, without atomics: every result has one owner, so two runs are bitwise equal.
Equation numbers are those of docs/kernel.md.

    delta_i = out_i . dout_i - dlse_i                 (8)    _bwd_delta_kernel
    ds_ij   = p_ij (dout_i . v_j - delta_i)           (9)
    dq_i    = scale * sum_j ds_ij k_j                 (10)   _bwd_dq_kernel, tiles of queries as in the forward pass
    dk_j    = scale * sum_i ds_ij q_i                 (11)   _bwd_dkdv_kernel, tiles of keys; the group's query heads
    dv_j    = sum_i p_ij dout_i                       (12)   are summed inside

With a cap on the scores, ds is multiplied by its derivative; with dropout, dout . v and the p of dv by the kept mask.
p is computed again as the forward pass had it, from m and 1 / l of each row (`norm`) and not from lse, whose rounding
would show where scores are large (13); where a row has no keys m is +inf and p is 0. Both tile kernels visit their span
in two loops with one body, as the forward pass does.
"""

import triton
import triton.language as tl

from packattn.kernels.tile import (
    NEVER,
    add_dot,
    dot_transposed,
    in_registers,
    keep_mask,
    keep_rows,
    load_tile,
    program_tile,
    scores,
    store_tile,
    unmasked_blocks,
    visible,
    zero_tile,
)  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _bwd_delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, stride_ot, stride_oh, stride_dot, stride_doh, tokens,
    HEAD_DIM_V: tl.constexpr, PARTS_V: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    m0, head = tl.program_id(0) * BLOCK_M, tl.cast(tl.program_id(1), tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    inside = m0 + offs_m < tokens
    at = tl.cast(m0, tl.int64)
    out_base, dout_base = out_ptr + at * stride_ot + head * stride_oh, dout_ptr + at * stride_dot + head * stride_doh
    out = load_tile(out_base, offs_m, stride_ot, inside, HEAD_DIM_V, PARTS_V, True)
    dout = load_tile(dout_base, offs_m, stride_dot, inside, HEAD_DIM_V, PARTS_V, True)
    where = head * tokens + m0 + offs_m
    delta = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(PARTS_V)):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + where, mask=inside, other=0.0)
    tl.store(delta_ptr + where, delta, mask=inside)


@triton.jit
def _accumulate_dq(
    dq, q, dout, rows, keys, options, lo, hi, gap, gap_length, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, PARTS_V: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale from the keys [lo, hi) in blocks; with MASKED, of which [gap, gap + gap_length) are left out."""
    token, head, row_start, row_end, m_i, inverse, delta, slope, anchor = rows
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
        v = load_tile(v_base + at * stride_vt, offs_n, stride_vt, key < tokens_k, HEAD_DIM_V, PARTS_V, MASKED)
        distance = anchor[:, None] - key[None, :]
        s, unit, derivative = scores(
            dot_transposed(q, k, PRECISION), scale, softcap, slope[:, None], distance, HAS_SOFTCAP, HAS_ALIBI
        )
        if MASKED:
            s = tl.where(visible(row_start, row_end, key), s, float("-inf"))
        p = tl.exp2(s * unit - m_i[:, None]) * inverse[:, None]
        dp = dot_transposed(dout, v, PRECISION)
        if HAS_DROPOUT:
            kept = keep_mask(seed, token[:, None], key[None, :], head[:, None], threshold)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None]) * derivative
        dq = add_dot(dq, ds, k, PRECISION)
    return dq


@triton.jit(
    do_not_specialize=["tokens", "tokens_k", "heads_k", "scale", "softcap", "threshold", "keep_scale"],
    do_not_specialize_on_alignment=["order_ptr"],
)
def _bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, dq_ptr, k_start_ptr, k_end_ptr, order_ptr, slopes_ptr,
    anchors_ptr, seed_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    stride_dqt, stride_dqh, stride_sh, stride_st, tokens, tokens_k, heads_k, scale, softcap, threshold, keep_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM_V: tl.constexpr, PARTS_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
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
    dout_rows = row // GROUP * stride_dot + tl.cast(row % GROUP, tl.int64) * stride_doh
    q = load_tile(q_ptr + at * stride_qt + head0 * stride_qh, q_rows, 1, inside, HEAD_DIM, PARTS, True)
    dout_base = dout_ptr + at * stride_dot + head0 * stride_doh
    dout = load_tile(dout_base, dout_rows, 1, inside, HEAD_DIM_V, PARTS_V, True)
    q, dout = in_registers(q, HELD), in_registers(dout, HELD)
    where = tl.cast(head, tl.int64) * tokens + token
    rest = tl.cast(heads_k, tl.int64) * GROUP * tokens
    m_i = tl.load(norm_ptr + where, mask=inside, other=float("inf"))
    inverse = tl.load(norm_ptr + where + rest, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + where, mask=inside, other=0.0)
    row_start = tl.load(k_start_ptr + token, mask=inside, other=NEVER)
    row_end = tl.load(k_end_ptr + token, mask=inside, other=0)
    slope, anchor = tl.zeros([BLOCK_M], tl.float32), token
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + tl.cast(head, tl.int64) * stride_sh + token * stride_st, mask=inside, other=0.0)
        anchor = tl.load(anchors_ptr + token, mask=inside, other=0)

    lo, hi = tl.load(k_start_ptr + m0), tl.load(k_end_ptr + last)
    begin, end = tl.load(k_start_ptr + last), tl.load(k_end_ptr + m0)
    kept = (row_start == lo) | (begin < end)
    if begin >= end:  # no key is seen by all rows: take those before the rows that do not begin at lo
        begin, end = lo, tl.minimum(end, tl.min(tl.where(row_start > lo, row_start, NEVER)))
    first, second = unmasked_blocks(lo, begin, end, BLOCK_N)

    k_base = k_ptr + tl.cast(head_k, tl.int64) * stride_kh
    v_base = v_ptr + tl.cast(head_k, tl.int64) * stride_vh
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    rows = (token, head, row_start, row_end, m_i, inverse, delta, slope, anchor)
    keys = (k_base, v_base, stride_kt, stride_vt, tokens_k)
    options = (scale, softcap, seed, threshold, keep_scale)

    dq = zero_tile(BLOCK_M, PARTS)
    dq = _accumulate_dq(
        dq, q, dout, rows, keys, options, first, second, 0, 0, HEAD_DIM, PARTS, HEAD_DIM_V, PARTS_V, BLOCK_N,
        HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION, False,
    )  # fmt: skip
    dq = keep_rows(dq, kept)
    dq = _accumulate_dq(
        dq, q, dout, rows, keys, options, lo, hi - (second - first), first, second - first, HEAD_DIM, PARTS,
        HEAD_DIM_V, PARTS_V, BLOCK_N, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip

    dq_rows = row // GROUP * stride_dqt + tl.cast(row % GROUP, tl.int64) * stride_dqh
    factor = tl.zeros([BLOCK_M], tl.float32) + scale
    store_tile(dq_ptr + at * stride_dqt + head0 * stride_dqh, dq_rows, 1, inside, dq, factor, HEAD_DIM, PARTS)


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, rows, queries, alibi, options, head0, lo, hi, gap, gap_length, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM_V: tl.constexpr, PARTS_V: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv from the queries [lo, hi) of HEADS heads, each block of all heads in turn.

    Rows of the score tile are keys, columns queries. With MASKED, [gap, gap + gap_length) are left out.
    """
    key, row_start, row_end = rows
    q_ptr, dout_ptr, norm_ptr, inverse_ptr, delta_ptr, stride_qt, stride_qh, stride_dot, stride_doh, tokens = queries
    slopes_ptr, anchors_ptr, stride_sh, stride_st = alibi
    scale, softcap, seed, threshold, keep_scale = options
    offs_m = tl.arange(0, BLOCK_M)
    for step in tl.range(0, tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M) * HEADS):
        m = lo + step // HEADS * BLOCK_M
        if MASKED:
            m += tl.where(m >= gap, gap_length, 0)
        head = head0 + step % HEADS
        token = m + offs_m
        inside = token < tokens
        at, head64 = tl.cast(m, tl.int64), tl.cast(head, tl.int64)
        q_base = q_ptr + at * stride_qt + head64 * stride_qh
        dout_base = dout_ptr + at * stride_dot + head64 * stride_doh
        q = load_tile(q_base, offs_m, stride_qt, inside, HEAD_DIM, PARTS, MASKED)
        dout = load_tile(dout_base, offs_m, stride_dot, inside, HEAD_DIM_V, PARTS_V, MASKED)
        where = head64 * tokens + m + offs_m
        if MASKED:
            m_i = tl.load(norm_ptr + where, mask=inside, other=float("inf"))
            inverse = tl.load(inverse_ptr + where, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + where, mask=inside, other=0.0)
        else:
            m_i, inverse = tl.load(norm_ptr + where), tl.load(inverse_ptr + where)
            delta = tl.load(delta_ptr + where)
        slope, anchor = delta, token
        if HAS_ALIBI:
            slope = tl.load(slopes_ptr + head64 * stride_sh + token * stride_st, mask=inside, other=0.0)
            anchor = tl.load(anchors_ptr + token, mask=inside, other=0)
        distance = anchor[None, :] - key[:, None]
        s, unit, derivative = scores(
            dot_transposed(k, q, PRECISION), scale, softcap, slope[None, :], distance, HAS_SOFTCAP, HAS_ALIBI
        )
        if MASKED:
            s = tl.where(visible(row_start, row_end, token), s, float("-inf"))
        p = tl.exp2(s * unit - m_i[None, :]) * inverse[None, :]
        dp = dot_transposed(v, dout, PRECISION)
        kept_p = p
        if HAS_DROPOUT:
            kept = keep_mask(seed, token[None, :], key[:, None], head, threshold)
            dp = tl.where(kept, dp * keep_scale, 0.0)
            kept_p = tl.where(kept, p * keep_scale, 0.0)
        dv = add_dot(dv, kept_p, dout, PRECISION)
        ds = p * (dp - delta[None, :]) * derivative
        dk = add_dot(dk, ds, q, PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=["tokens", "tokens_k", "heads_k", "scale", "softcap", "threshold", "keep_scale"],
    do_not_specialize_on_alignment=["order_ptr"],
)
def _bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr, q_start_ptr, q_end_ptr, order_ptr, slopes_ptr,
    anchors_ptr, seed_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    stride_dks, stride_dkt, stride_dkh, stride_dvs, stride_dvt, stride_dvh, stride_sh, stride_st, tokens, tokens_k,
    heads_k, scale, softcap, threshold, keep_scale, GROUP: tl.constexpr, SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr, HEAD_DIM_V: tl.constexpr, PARTS_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """One of SPLIT programs of a tile takes GROUP // SPLIT query heads and writes its share of dk and dv."""
    HEADS: tl.constexpr = GROUP // SPLIT
    tile, part = program_tile(order_ptr, heads_k * SPLIT, HAS_ORDER)
    head_k, split = part // SPLIT, tl.cast(part % SPLIT, tl.int64)
    n0 = tile * BLOCK_N
    last = tl.minimum(n0 + BLOCK_N, tokens_k) - 1
    at, kv = tl.cast(n0, tl.int64), tl.cast(head_k, tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    key = n0 + offs_n
    inside = key < tokens_k
    k = load_tile(k_ptr + at * stride_kt + kv * stride_kh, offs_n, stride_kt, inside, HEAD_DIM, PARTS, True)
    v = load_tile(v_ptr + at * stride_vt + kv * stride_vh, offs_n, stride_vt, inside, HEAD_DIM_V, PARTS_V, True)
    k, v = in_registers(k, HELD), in_registers(v, HELD)
    row_start = tl.load(q_start_ptr + key, mask=inside, other=0)
    row_end = tl.load(q_end_ptr + key, mask=inside, other=0)

    lo, hi = tl.load(q_start_ptr + n0), tl.load(q_end_ptr + last)
    begin, end = tl.load(q_start_ptr + last), tl.load(q_end_ptr + n0)
    kept = (row_end == hi) | (begin < end)
    if begin >= end:  # no query sees all keys: take those after the keys that do not end at hi
        begin, end = tl.maximum(begin, tl.max(tl.where(row_end < hi, row_end, 0))), hi
    first, second = unmasked_blocks(lo, begin, end, BLOCK_M)

    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    head0 = head_k * GROUP + (part % SPLIT) * HEADS
    rows = (key, row_start, row_end)
    inverse_ptr = norm_ptr + tl.cast(heads_k, tl.int64) * GROUP * tokens
    queries = (q_ptr, dout_ptr, norm_ptr, inverse_ptr, delta_ptr, stride_qt, stride_qh, stride_dot, stride_doh, tokens)
    alibi = (slopes_ptr, anchors_ptr, stride_sh, stride_st)
    options = (scale, softcap, seed, threshold, keep_scale)

    dk, dv = zero_tile(BLOCK_N, PARTS), zero_tile(BLOCK_N, PARTS_V)
    dk, dv = _accumulate_dkdv(
        dk, dv, k, v, rows, queries, alibi, options, head0, first, second, 0, 0, HEADS, HEAD_DIM, PARTS, HEAD_DIM_V,
        PARTS_V, BLOCK_M, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION, False,
    )  # fmt: skip
    dk, dv = keep_rows(dk, kept), keep_rows(dv, kept)
    dk, dv = _accumulate_dkdv(
        dk, dv, k, v, rows, queries, alibi, options, head0, lo, hi - (second - first), first, second - first, HEADS,
        HEAD_DIM, PARTS, HEAD_DIM_V, PARTS_V, BLOCK_M, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip

    dk_base = dk_ptr + split * stride_dks + at * stride_dkt + kv * stride_dkh
    dv_base = dv_ptr + split * stride_dvs + at * stride_dvt + kv * stride_dvh
    one = tl.full([BLOCK_N], 1.0, tl.float32)
    store_tile(dk_base, offs_n, stride_dkt, inside, dk, one * scale, HEAD_DIM, PARTS)
    store_tile(dv_base, offs_n, stride_dvt, inside, dv, one, HEAD_DIM_V, PARTS_V)
