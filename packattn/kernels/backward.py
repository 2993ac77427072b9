"""Backward pass, in three kernels, without atomics: every result has one owner, so two runs are bitwise equal.

    delta_i = out_i . dout_i - dlse_i                 _bwd_delta_kernel
    ds_ij   = p_ij (dout_i . v_j - delta_i)
    dq_i    = scale * sum_j ds_ij k_j                 _bwd_dq_kernel, tiles of queries as in the forward pass
    dk_j    = scale * sum_i ds_ij q_i                 _bwd_dkdv_kernel, tiles of keys; the group's query heads are
    dv_j    = sum_i p_ij dout_i                       summed inside, so nothing of the size of q is written for k

With a cap on the scores, ds is multiplied by its derivative; with dropout, dout . v and the p of dv by the kept mask.
p is computed again from lse. Rows that no key serves have lse = -inf, taken as +inf here, so that their p is 0.
"""

import triton
import triton.language as tl

from packattn.kernels.tile import LOG2E, capped_scores, keep_mask, load_tile, split_range, visible


@triton.jit(do_not_specialize=["tokens"])
def _bwd_delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, stride_ot, stride_oh, stride_dot, stride_doh, tokens,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    m0, head = tl.program_id(0) * BLOCK_M, tl.cast(tl.program_id(1), tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    inside = m0 + offs_m < tokens
    at = tl.cast(m0, tl.int64)
    # [BLOCK_M, BLOCK_DV]
    out = load_tile(out_ptr + at * stride_ot + head * stride_oh, offs_m, stride_ot, inside, HEAD_DIM_V, BLOCK_DV, True)
    dout = load_tile(
        dout_ptr + at * stride_dot + head * stride_doh, offs_m, stride_dot, inside, HEAD_DIM_V, BLOCK_DV, True
    )
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    where = head * tokens + m0 + offs_m
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + where, mask=inside, other=0.0)
    tl.store(delta_ptr + where, delta, mask=inside)


@triton.jit
def _row_statistics(lse_ptr, delta_ptr, where, inside):
    """lse in base 2 (+inf for rows without keys and outside) and delta of the rows at `where`."""
    lse = tl.load(lse_ptr + where, mask=inside, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E
    return lse, tl.load(delta_ptr + where, mask=inside, other=0.0)


@triton.jit
def _accumulate_dq(
    dq, q, dout, lse, delta, k_base, v_base, stride_kt, stride_vt, row_start, row_end, token, head, lo, hi, tokens_k,
    scale, softcap, seed, threshold, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale from the keys [lo, hi) in blocks of BLOCK_N; without MASKED every row sees every key."""
    offs_n = tl.arange(0, BLOCK_N)
    for n in tl.range(lo, hi, BLOCK_N):
        key = n + offs_n
        at = tl.cast(n, tl.int64)
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        k = load_tile(k_base + at * stride_kt, offs_n, stride_kt, key < tokens_k, HEAD_DIM, BLOCK_D, MASKED)
        v = load_tile(v_base + at * stride_vt, offs_n, stride_vt, key < tokens_k, HEAD_DIM_V, BLOCK_DV, MASKED)
        s, slope = capped_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, HAS_SOFTCAP)
        if MASKED:
            s = tl.where(visible(row_start, row_end, key), s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if HAS_DROPOUT:
            kept = keep_mask(seed, token[:, None], key[None, :], head[:, None], threshold)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["tokens", "tokens_k", "scale", "softcap", "threshold", "keep_scale"])
def _bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, k_start_ptr, k_end_ptr, seed_ptr, stride_qt, stride_qh,
    stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dqt, stride_dqh, tokens, tokens_k,
    scale, softcap, threshold, keep_scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILE_TOKENS: tl.constexpr = BLOCK_M // GROUP
    m0 = tl.program_id(0) * TILE_TOKENS
    last = tl.minimum(m0 + TILE_TOKENS, tokens) - 1
    head_k = tl.program_id(1)

    row = tl.arange(0, BLOCK_M)
    token = m0 + row // GROUP
    head = head_k * GROUP + row % GROUP
    inside = (row < TILE_TOKENS * GROUP) & (token <= last)
    at, head0 = tl.cast(m0, tl.int64), tl.cast(head_k, tl.int64) * GROUP
    q_rows = row // GROUP * stride_qt + row % GROUP * stride_qh
    do_rows = row // GROUP * stride_dot + row % GROUP * stride_doh
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    q = load_tile(q_ptr + at * stride_qt + head0 * stride_qh, q_rows, 1, inside, HEAD_DIM, BLOCK_D, True)
    dout = load_tile(dout_ptr + at * stride_dot + head0 * stride_doh, do_rows, 1, inside, HEAD_DIM_V, BLOCK_DV, True)
    lse, delta = _row_statistics(lse_ptr, delta_ptr, tl.cast(head, tl.int64) * tokens + token, inside)
    row_start = tl.load(k_start_ptr + token, mask=inside, other=0)
    row_end = tl.load(k_end_ptr + token, mask=inside, other=0)

    lo, hi = tl.load(k_start_ptr + m0), tl.load(k_end_ptr + last)
    first, second = split_range(lo, hi, tl.load(k_start_ptr + last), tl.load(k_end_ptr + m0), BLOCK_N)
    k_base = k_ptr + tl.cast(head_k, tl.int64) * stride_kh
    v_base = v_ptr + tl.cast(head_k, tl.int64) * stride_vh
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _accumulate_dq(
        dq, q, dout, lse, delta, k_base, v_base, stride_kt, stride_vt, row_start, row_end, token, head, lo, first,
        tokens_k, scale, softcap, seed, threshold, keep_scale, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_N,
        HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, dout, lse, delta, k_base, v_base, stride_kt, stride_vt, row_start, row_end, token, head, first, second,
        tokens_k, scale, softcap, seed, threshold, keep_scale, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_N,
        HAS_SOFTCAP, HAS_DROPOUT, PRECISION, False,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, dout, lse, delta, k_base, v_base, stride_kt, stride_vt, row_start, row_end, token, head, second, hi,
        tokens_k, scale, softcap, seed, threshold, keep_scale, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_N,
        HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip

    d = tl.arange(0, BLOCK_D)
    dq_rows = row // GROUP * stride_dqt + row % GROUP * stride_dqh
    tl.store(
        dq_ptr + at * stride_dqt + head0 * stride_dqh + dq_rows[:, None] + d[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < HEAD_DIM),
    )


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, q_base, dout_base, stride_qt, stride_dot, lse_ptr, delta_ptr, row_start, row_end, key, head, lo, hi,
    tokens, scale, softcap, seed, threshold, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv from the queries [lo, hi) of one head; rows of the score tile are keys, columns queries."""
    offs_m = tl.arange(0, BLOCK_M)
    for m in tl.range(lo, hi, BLOCK_M):
        token = m + offs_m
        inside = token < tokens
        at = tl.cast(m, tl.int64)
        # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
        q = load_tile(q_base + at * stride_qt, offs_m, stride_qt, inside, HEAD_DIM, BLOCK_D, MASKED)
        dout = load_tile(dout_base + at * stride_dot, offs_m, stride_dot, inside, HEAD_DIM_V, BLOCK_DV, MASKED)
        lse, delta = _row_statistics(lse_ptr, delta_ptr, tl.cast(head, tl.int64) * tokens + token, inside)
        s, slope = capped_scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap, HAS_SOFTCAP)
        if MASKED:
            s = tl.where(visible(row_start, row_end, token), s, float("-inf"))
        p = tl.exp2(s - lse[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        kept_p = p
        if HAS_DROPOUT:
            kept = keep_mask(seed, token[None, :], key[:, None], head, threshold)
            dp = tl.where(kept, dp * keep_scale, 0.0)
            kept_p = tl.where(kept, p * keep_scale, 0.0)
        dv = tl.dot(kept_p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :]) * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "tokens_k", "scale", "softcap", "threshold", "keep_scale"])
def _bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_start_ptr, q_end_ptr, seed_ptr, stride_qt,
    stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dkt, stride_dkh, stride_dvt,
    stride_dvh, tokens, tokens_k, scale, softcap, threshold, keep_scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n0 = tl.program_id(0) * BLOCK_N
    last = tl.minimum(n0 + BLOCK_N, tokens_k) - 1
    head_k = tl.program_id(1)
    at, kv = tl.cast(n0, tl.int64), tl.cast(head_k, tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    key = n0 + offs_n
    inside = key < tokens_k
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    k = load_tile(k_ptr + at * stride_kt + kv * stride_kh, offs_n, stride_kt, inside, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_ptr + at * stride_vt + kv * stride_vh, offs_n, stride_vt, inside, HEAD_DIM_V, BLOCK_DV, True)
    row_start = tl.load(q_start_ptr + key, mask=inside, other=0)
    row_end = tl.load(q_end_ptr + key, mask=inside, other=0)

    lo, hi = tl.load(q_start_ptr + n0), tl.load(q_end_ptr + last)
    first, second = split_range(lo, hi, tl.load(q_start_ptr + last), tl.load(q_end_ptr + n0), BLOCK_M)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(GROUP):
        head = head_k * GROUP + g
        q_base = q_ptr + tl.cast(head, tl.int64) * stride_qh
        dout_base = dout_ptr + tl.cast(head, tl.int64) * stride_doh
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, q_base, dout_base, stride_qt, stride_dot, lse_ptr, delta_ptr, row_start, row_end, key, head,
            lo, first, tokens, scale, softcap, seed, threshold, keep_scale, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV,
            BLOCK_M, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True,
        )  # fmt: skip
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, q_base, dout_base, stride_qt, stride_dot, lse_ptr, delta_ptr, row_start, row_end, key, head,
            first, second, tokens, scale, softcap, seed, threshold, keep_scale, HEAD_DIM, BLOCK_D, HEAD_DIM_V,
            BLOCK_DV, BLOCK_M, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, False,
        )  # fmt: skip
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, q_base, dout_base, stride_qt, stride_dot, lse_ptr, delta_ptr, row_start, row_end, key, head,
            second, hi, tokens, scale, softcap, seed, threshold, keep_scale, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV,
            BLOCK_M, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True,
        )  # fmt: skip

    d, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    tl.store(
        dk_ptr + at * stride_dkt + kv * stride_dkh + offs_n[:, None] * stride_dkt + d[None, :],
        (dk * scale).to(dk_ptr.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < HEAD_DIM),
    )
    tl.store(
        dv_ptr + at * stride_dvt + kv * stride_dvh + offs_n[:, None] * stride_dvt + d_v[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=inside[:, None] & (d_v[None, :] < HEAD_DIM_V),
    )
