"""The kernels of the backward pass; `backward.py` launches them.

No atomics, so that equal inputs give equal gradients.  One kernel owns a tile of queries and walks the key blocks of
its row for dQ; another owns a tile of keys and walks the query blocks that list it for dK and dV.  Both recompute the
weights from the log-sum-exp of the forward pass (FlashAttention-2, arXiv 2307.08691).
"""

# Kernel arguments are device values, for which Python has no types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import triton
import triton.language as tl

from .forward import _load_rows
from .pair_tests import NO_TEST, pair_keeps


@triton.jit
def delta_kernel(
    Out,
    Grad,
    GradLse,
    Lse,
    Delta,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    grad_stride_b,
    grad_stride_h,
    grad_stride_s,
    heads,
    q_len,
    HEAD_DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """Computes `sum(out * grad_out) - grad_lse` per query; grid (tiles of queries, batch * heads)."""
    start = tl.program_id(0) * TILE_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    offsets, dims = tl.arange(0, TILE_M), tl.arange(0, PAD_DIM)
    Out += batch * out_stride_b + head * out_stride_h
    Grad += batch * grad_stride_b + head * grad_stride_h
    out = _load_rows(Out, start, out_stride_s, q_len, offsets, dims, HEAD_DIM, True).to(tl.float32)
    grad = _load_rows(Grad, start, grad_stride_s, q_len, offsets, dims, HEAD_DIM, True).to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * q_len + start + offsets
    inside = start + offsets < q_len
    delta = tl.sum(out * grad, 1) - tl.load(GradLse + at, mask=inside, other=0.0)
    # A query without keys gets gradient 0, whatever arrives at its lse of -inf.
    some = tl.load(Lse + at, mask=inside, other=0.0) > float("-inf")
    tl.store(Delta + at, tl.where(some, delta, 0.0), mask=inside)


@triton.jit
def _load_queries(values, start, offsets, limit, other, MASKED: tl.constexpr):
    """Loads one float32 per query of a tile."""
    if MASKED:
        return tl.load(values + start + offsets, mask=start + offsets < limit, other=other)
    return tl.load(values + start + offsets)


@triton.jit
def dq_kernel(
    Q,
    K,
    V,
    Grad,
    GradQ,
    Lse,
    Delta,
    Indices,
    Counts,
    FullCounts,
    Table,
    Lookup,
    scale,
    scale_log2,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    grad_stride_b,
    grad_stride_h,
    grad_stride_s,
    list_stride_b,
    list_stride_h,
    list_stride_row,
    count_stride_b,
    count_stride_h,
    heads,
    q_len,
    kv_len,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    HEAD_DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED_TILE: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    PREDICATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes dQ of one tile of queries; grid (q blocks * tiles per block, batch * heads).

    Arguments as in `forward_kernel`; `GradQ` is contiguous `[B, H, q_len, HEAD_DIM]`, `Lse` and `Delta` are contiguous
    `[B, H, q_len]`.  SHORT_TAIL says that the last key block is short.
    """
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    row = tile // (BLOCK_Q // TILE_M)

    counts_at = batch * count_stride_b + head * count_stride_h + row
    listed = tl.load(Counts + counts_at)
    blocks = Indices + batch * list_stride_b + head * list_stride_h + row.to(tl.int64) * list_stride_row
    full = listed
    if PREDICATE != NO_TEST:
        full = tl.load(FullCounts + counts_at)
    plain = full
    if SHORT_TAIL:
        # The short block has the highest id, so among the ascending FULL blocks it can only be the last one.
        final = tl.load(blocks + full - 1, mask=full > 0, other=-1)
        plain = tl.where(final == kv_len // BLOCK_KV, full - 1, full)

    Q += batch * q_stride_b + head * q_stride_h
    K += batch * k_stride_b + head * k_stride_h
    V += batch * v_stride_b + head * v_stride_h
    Grad += batch * grad_stride_b + head * grad_stride_h
    GradQ += pair * q_len * HEAD_DIM

    dims = tl.arange(0, PAD_DIM)
    m_offsets = tl.arange(0, TILE_M)
    n_offsets = tl.arange(0, TILE_N)
    first = tile * TILE_M
    q_pos = first + m_offsets
    q = _load_rows(Q, first, q_stride_s, q_len, m_offsets, dims, HEAD_DIM, True)
    grad = _load_rows(Grad, first, grad_stride_s, q_len, m_offsets, dims, HEAD_DIM, True)
    # +inf makes every weight of a query that does not exist 0.
    lse = _load_queries(Lse + pair * q_len, first, m_offsets, q_len, float("inf"), True) * 1.4426950408889634
    delta = _load_queries(Delta + pair * q_len, first, m_offsets, q_len, 0.0, True)
    acc = tl.zeros([TILE_M, PAD_DIM], tl.float32)

    STEPS: tl.constexpr = BLOCK_KV // TILE_N
    PADDED: tl.constexpr = HEAD_DIM != PAD_DIM
    for step in tl.range(0, plain * STEPS, num_stages=STAGES):
        start = tl.load(blocks + step // STEPS) * BLOCK_KV + (step % STEPS) * TILE_N
        k = _load_rows(K, start, k_stride_s, kv_len, n_offsets, dims, HEAD_DIM, PADDED)
        v = _load_rows(V, start, v_stride_s, kv_len, n_offsets, dims, HEAD_DIM, PADDED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        weights = tl.math.exp2(scores - lse[:, None])
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_scores = (weights * (grad_weights - delta[:, None])).to(k.dtype)
        acc = tl.dot(grad_scores, k, acc, input_precision=PRECISION)

    if SHORT_TAIL or PREDICATE != NO_TEST:
        # The mask needs registers too, so this loop takes narrower steps.
        MASKED_STEPS: tl.constexpr = BLOCK_KV // MASKED_TILE
        masked_offsets = tl.arange(0, MASKED_TILE)
        for step in tl.range(plain * MASKED_STEPS, listed * MASKED_STEPS, num_stages=1):
            start = tl.load(blocks + step // MASKED_STEPS) * BLOCK_KV + (step % MASKED_STEPS) * MASKED_TILE
            kv_pos = start + masked_offsets
            k = _load_rows(K, start, k_stride_s, kv_len, masked_offsets, dims, HEAD_DIM, True)
            v = _load_rows(V, start, v_stride_s, kv_len, masked_offsets, dims, HEAD_DIM, True)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            keep = (kv_pos < kv_len)[None, :]
            if PREDICATE != NO_TEST:
                kept = pair_keeps(
                    first,
                    q_pos[:, None],
                    start,
                    kv_pos[None, :],
                    batch,
                    head,
                    Table,
                    Lookup,
                    n0,
                    n1,
                    n2,
                    n3,
                    n4,
                    n5,
                    q_len,
                    kv_len,
                    BLOCK_Q,
                    BLOCK_KV,
                    PREDICATE,
                )
                keep = keep & (kept | (step < full * MASKED_STEPS))
            # Masked after the exponential: a query without keys has lse -inf, and its exponentials are infinite.
            weights = tl.where(keep, tl.math.exp2(scores - lse[:, None]), 0.0)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_scores = (weights * (grad_weights - delta[:, None])).to(k.dtype)
            acc = tl.dot(grad_scores, k, acc, input_precision=PRECISION)

    targets = GradQ + first.to(tl.int64) * HEAD_DIM + m_offsets[:, None] * HEAD_DIM + dims[None, :]
    inside = (q_pos < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(targets, (acc * scale).to(GradQ.dtype.element_ty), mask=inside)


@triton.jit
def dkv_kernel(
    Q,
    K,
    V,
    Grad,
    GradK,
    GradV,
    Lse,
    Delta,
    Rows,
    Bounds,
    Table,
    Lookup,
    scale,
    scale_log2,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    grad_stride_b,
    grad_stride_h,
    grad_stride_s,
    rows_stride_b,
    rows_stride_h,
    bounds_stride_b,
    bounds_stride_h,
    heads,
    q_len,
    kv_len,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    HEAD_DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED_TILE: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    PREDICATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes dK and dV of one tile of keys; grid (kv blocks * tiles per block, batch * heads).

    `Rows` and `Bounds` are those of `ColumnLists`, with a last stride of 1; `GradK` and `GradV` are contiguous.
    SHORT_TAIL says that the last query block is short.  Keys behind the end need no mask: each key only reaches its
    own rows of dK and dV, and those are not stored.
    """
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    column = tile // (BLOCK_KV // TILE_N)

    bounds = Bounds + batch * bounds_stride_b + head * bounds_stride_h + 2 * column
    begin, middle = tl.load(bounds), tl.load(bounds + 1)
    rows = Rows + batch * rows_stride_b + head * rows_stride_h

    Q += batch * q_stride_b + head * q_stride_h
    K += batch * k_stride_b + head * k_stride_h
    V += batch * v_stride_b + head * v_stride_h
    Grad += batch * grad_stride_b + head * grad_stride_h
    Lse += pair * q_len
    Delta += pair * q_len

    dims = tl.arange(0, PAD_DIM)
    m_offsets = tl.arange(0, TILE_M)
    n_offsets = tl.arange(0, TILE_N)
    first = tile * TILE_N
    kv_pos = first + n_offsets
    k = _load_rows(K, first, k_stride_s, kv_len, n_offsets, dims, HEAD_DIM, True)
    v = _load_rows(V, first, v_stride_s, kv_len, n_offsets, dims, HEAD_DIM, True)
    acc_k = tl.zeros([TILE_N, PAD_DIM], tl.float32)
    acc_v = tl.zeros([TILE_N, PAD_DIM], tl.float32)

    STEPS: tl.constexpr = BLOCK_Q // TILE_M
    PADDED: tl.constexpr = SHORT_TAIL or HEAD_DIM != PAD_DIM
    for step in tl.range(begin * STEPS, middle * STEPS, num_stages=STAGES):
        start = tl.load(rows + step // STEPS) * BLOCK_Q + (step % STEPS) * TILE_M
        q = _load_rows(Q, start, q_stride_s, q_len, m_offsets, dims, HEAD_DIM, PADDED)
        lse = _load_queries(Lse, start, m_offsets, q_len, float("inf"), SHORT_TAIL) * 1.4426950408889634
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
        weights = tl.math.exp2(scores - lse[None, :])
        grad = _load_rows(Grad, start, grad_stride_s, q_len, m_offsets, dims, HEAD_DIM, PADDED)
        acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        delta = _load_queries(Delta, start, m_offsets, q_len, 0.0, SHORT_TAIL)
        grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_scores = (weights * (grad_weights - delta[None, :])).to(q.dtype)
        acc_k = tl.dot(grad_scores, q, acc_k, input_precision=PRECISION)

    if PREDICATE != NO_TEST:
        # The mask needs registers too, so this loop takes narrower steps.
        last = tl.load(bounds + 2)
        MASKED_STEPS: tl.constexpr = BLOCK_Q // MASKED_TILE
        masked_offsets = tl.arange(0, MASKED_TILE)
        for step in tl.range(middle * MASKED_STEPS, last * MASKED_STEPS, num_stages=1):
            start = tl.load(rows + step // MASKED_STEPS) * BLOCK_Q + (step % MASKED_STEPS) * MASKED_TILE
            q = _load_rows(Q, start, q_stride_s, q_len, masked_offsets, dims, HEAD_DIM, True)
            lse = _load_queries(Lse, start, masked_offsets, q_len, float("inf"), True) * 1.4426950408889634
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
            keep = pair_keeps(
                start,
                (start + masked_offsets)[None, :],
                first,
                kv_pos[:, None],
                batch,
                head,
                Table,
                Lookup,
                n0,
                n1,
                n2,
                n3,
                n4,
                n5,
                q_len,
                kv_len,
                BLOCK_Q,
                BLOCK_KV,
                PREDICATE,
            )
            weights = tl.where(keep, tl.math.exp2(scores - lse[None, :]), 0.0)
            grad = _load_rows(Grad, start, grad_stride_s, q_len, masked_offsets, dims, HEAD_DIM, True)
            acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
            delta = _load_queries(Delta, start, masked_offsets, q_len, 0.0, True)
            grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            grad_scores = (weights * (grad_weights - delta[None, :])).to(q.dtype)
            acc_k = tl.dot(grad_scores, q, acc_k, input_precision=PRECISION)

    at = pair * kv_len * HEAD_DIM + first.to(tl.int64) * HEAD_DIM + n_offsets[:, None] * HEAD_DIM + dims[None, :]
    inside = (kv_pos < kv_len)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(GradK + at, (acc_k * scale).to(GradK.dtype.element_ty), mask=inside)
    tl.store(GradV + at, acc_v.to(GradV.dtype.element_ty), mask=inside)
