"""Block-sparse flash attention in Triton: the forward pass.

One program owns a tile of queries and walks the key blocks its row lists, twice: first the FULL blocks, without any
mask, then the blocks that need one (the short last block and the PARTIAL ones).  The softmax runs online in base 2
(FlashAttention, arXiv 2205.14135).  Kernel tiles may be smaller than plan blocks: a listed block of 128 keys can be
walked in steps of 64.

Importing this module imports Triton but needs neither a GPU nor a driver.
"""

# Kernel arguments are device values, for which Python has no types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..residual import Residual
from ..sparse_plan import SparsePlan
from .centroids import centroid_arguments
from .forward_config import forward_precision, kernel_constants, launch_config
from .generation import capability_of
from .options import DEFAULT_OPTIONS, KernelOptions, largest_norms, longest_first
from .pair_tests import NO_TEST, pair_keeps, predicate, test_arguments

_LOG2_E = 1.4426950408889634


@triton.jit
def _load_rows(base, start, stride, limit, offsets, dims, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Loads rows `start + offsets` of a [tokens, HEAD_DIM] matrix; zeros behind `limit` and behind HEAD_DIM."""
    # The start goes into the pointer in 64 bits, so that offsets within the tile stay small 32-bit numbers.
    pointers = base + tl.cast(start, tl.int64) * stride + offsets[:, None] * stride + dims[None, :]
    if MASKED:
        return tl.load(pointers, mask=(start + offsets < limit)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _softmax_step(scores, top, total, acc):
    """Folds one tile of base-2 scores into the running maximum, sum and output."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.math.exp2(scores - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    return weights, new_top, total * shrink + tl.sum(weights, 1), acc * shrink[:, None]


@triton.jit
def _sparing_step(scores, top, total, acc, online, SOFTMAX: tl.constexpr):
    """The same with the maximum raised only where it has to be; see `KernelOptions.softmax`."""
    if SOFTMAX == "lazy":
        # One branch for the whole tile: a rescaled accumulator costs the same for one row as for all.
        online = tl.max(tl.max(scores, 1) - top, 0) > 8.0
    if online:
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.math.exp2(top - new_top)
        top = new_top
        total = total * shrink
        acc = acc * shrink[:, None]
    weights = tl.math.exp2(scores - top[:, None])
    return weights, top, total + tl.sum(weights, 1), acc


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    Out,
    Lse,
    Indices,
    Counts,
    FullCounts,
    Order,
    KeyNorms,
    Table,
    Lookup,
    KMean,
    VMean,
    LogSizes,
    Listed,
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
    out_stride_b,
    out_stride_h,
    out_stride_s,
    list_stride_b,
    list_stride_h,
    list_stride_row,
    count_stride_b,
    count_stride_h,
    listed_stride_b,
    listed_stride_h,
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
    MASKED_TILE_N: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    PREDICATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    ORDERED: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Attends one tile of queries; grid (q blocks * tiles per block, batch * heads).

    Args are device pointers, strides in elements (last strides are 1) and lengths in tokens.  `Counts` and
    `FullCounts` have a last stride of 1.  PREDICATE, `Table`, `Lookup` and `n0` to `n5`: see `pair_keeps`.  Without a
    test, they and `FullCounts` are not read.  `KMean` and `VMean` are contiguous `[B, H, kv blocks, HEAD_DIM]`,
    `LogSizes` is base 2 `[kv blocks]`, `Listed` is `[q blocks, kv blocks]` for each batch item and head; only RESIDUAL
    reads them.  `Order` is strided like `Counts`, `KeyNorms` is contiguous `[B, H]`; ORDERED and a SOFTMAX of "static"
    read them.
    """
    tile = tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    TILES: tl.constexpr = BLOCK_Q // TILE_M
    if ORDERED:
        order_at = batch * count_stride_b + head * count_stride_h + tile // TILES
        tile = tl.load(Order + order_at) * TILES + tile % TILES
    row = tile // TILES

    counts_at = batch * count_stride_b + head * count_stride_h + row
    listed = tl.load(Counts + counts_at)
    blocks = Indices + batch.to(tl.int64) * list_stride_b + head.to(tl.int64) * list_stride_h
    blocks += row.to(tl.int64) * list_stride_row
    full = listed
    if PREDICATE != NO_TEST:
        full = tl.load(FullCounts + counts_at)
    plain = full
    if SHORT_TAIL:
        # The short block has the highest id, so among the ascending FULL blocks it can only be the last one.
        final = tl.load(blocks + full - 1, mask=full > 0, other=-1)
        plain = tl.where(final == kv_len // BLOCK_KV, full - 1, full)

    Q += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    K += batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    V += batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    Out += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h

    dims = tl.arange(0, PAD_DIM)
    m_offsets = tl.arange(0, TILE_M)
    n_offsets = tl.arange(0, TILE_N)
    q_pos = tile * TILE_M + m_offsets
    q = _load_rows(Q, tile * TILE_M, q_stride_s, q_len, m_offsets, dims, HEAD_DIM, True)

    # A finite lower bound instead of -inf keeps exp2(top - new_top) free of NaN while nothing has been kept.
    top = tl.full([TILE_M], -1.0e30, tl.float32)
    online = True
    if SOFTMAX == "static":
        # Scores are between -bound and bound.  With 60 for it, exponentials and their sums fit float32 and bfloat16.
        longest = tl.sqrt(tl.max(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1), 0))
        bound = longest * tl.load(KeyNorms + tl.program_id(1)) * scale_log2
        # Not `>`: a bound of NaN takes the way that promises nothing.
        online = (bound <= 60.0) == 0
        top = tl.where(online, top, 0.0)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, PAD_DIM], tl.float32)

    if RESIDUAL:
        # One score for each block that is not listed, times its number of keys: that is a bias in base 2.
        kv_blocks = (kv_len + BLOCK_KV - 1) // BLOCK_KV
        means_at = tl.program_id(1).to(tl.int64) * kv_blocks * HEAD_DIM
        Listed += batch.to(tl.int64) * listed_stride_b + head.to(tl.int64) * listed_stride_h
        Listed += row.to(tl.int64) * kv_blocks
        group = tl.arange(0, GROUP)
        for first in tl.range(0, kv_blocks, GROUP, num_stages=1):
            ids = first + group
            skipped = tl.load(Listed + ids, mask=ids < kv_blocks, other=1)
            log_sizes = tl.load(LogSizes + ids, mask=ids < kv_blocks, other=0.0)
            k = _load_rows(KMean + means_at, first, HEAD_DIM, kv_blocks, group, dims, HEAD_DIM, True)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + log_sizes[None, :]
            scores = tl.where((skipped == 0)[None, :], scores, float("-inf"))
            weights, top, total, acc = _softmax_step(scores, top, total, acc)
            v = _load_rows(VMean + means_at, first, HEAD_DIM, kv_blocks, group, dims, HEAD_DIM, True)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    STEPS: tl.constexpr = BLOCK_KV // TILE_N
    PADDED: tl.constexpr = HEAD_DIM != PAD_DIM
    for step in tl.range(0, plain * STEPS, num_stages=STAGES):
        start = tl.load(blocks + step // STEPS) * BLOCK_KV + (step % STEPS) * TILE_N
        k = _load_rows(K, start, k_stride_s, kv_len, n_offsets, dims, HEAD_DIM, PADDED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if SOFTMAX == "online":
            weights, top, total, acc = _softmax_step(scores, top, total, acc)
        else:
            weights, top, total, acc = _sparing_step(scores, top, total, acc, online, SOFTMAX)
        v = _load_rows(V, start, v_stride_s, kv_len, n_offsets, dims, HEAD_DIM, PADDED)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    if SHORT_TAIL or PREDICATE != NO_TEST:
        # The mask needs registers too, so this loop takes narrower steps.
        MASKED_STEPS: tl.constexpr = BLOCK_KV // MASKED_TILE_N
        masked_offsets = tl.arange(0, MASKED_TILE_N)
        for step in tl.range(plain * MASKED_STEPS, listed * MASKED_STEPS, num_stages=1):
            start = tl.load(blocks + step // MASKED_STEPS) * BLOCK_KV + (step % MASKED_STEPS) * MASKED_TILE_N
            kv_pos = start + masked_offsets
            k = _load_rows(K, start, k_stride_s, kv_len, masked_offsets, dims, HEAD_DIM, True)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            keep = (kv_pos < kv_len)[None, :]
            if PREDICATE != NO_TEST:
                kept = pair_keeps(
                    tile * TILE_M,
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
            scores = tl.where(keep, scores, float("-inf"))
            weights, top, total, acc = _softmax_step(scores, top, total, acc)
            v = _load_rows(V, start, v_stride_s, kv_len, masked_offsets, dims, HEAD_DIM, True)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    inside = q_pos < q_len
    tl.store(Lse + tl.program_id(1).to(tl.int64) * q_len + q_pos, lse, mask=inside)
    out = (acc / total[:, None]).to(Out.dtype.element_ty)
    targets = Out + (tile * TILE_M).to(tl.int64) * out_stride_s + m_offsets[:, None] * out_stride_s + dims[None, :]
    tl.store(targets, out, mask=inside[:, None] & (dims < HEAD_DIM)[None, :])


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    scale: float,
    residual: Residual | None = None,
    options: KernelOptions = DEFAULT_OPTIONS,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel.

    Args:
        q: `[B, H, q_len, D]`, last stride 1, other strides free.
        k: `[B, H, kv_len, D]`, likewise.
        v: `[B, H, kv_len, D]`, likewise.
        plan: Who attends to whom, in plan positions; blocks are multiples of 16.
        scale: Positive factor on the scores.
        residual: What blocks that are not listed contribute, or None.  Means are rounded to the dtype of q.
        options: Scheduling and softmax; they change how fast the result comes, and its last digits.

    Returns:
        `(out, lse)`: out contiguous in the dtype and shape of q; lse float32 `[B, H, q_len]`, natural log.

    Raises:
        ValueError: The options do not fit the dtype.
    """
    options.check(q.dtype, capability_of(q.device))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.device.type != "cuda":
        _launch(q, k, v, plan, scale, residual, options, out, lse, None)
        return out, lse
    with torch.cuda.device(q.device):
        _launch(q, k, v, plan, scale, residual, options, out, lse, capability_of(q.device))
    return out, lse


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    scale: float,
    residual: Residual | None,
    options: KernelOptions,
    out: Tensor,
    lse: Tensor,
    capability: tuple[int, int] | None,
) -> None:
    batch, heads, q_len, head_dim = q.shape
    config = launch_config(capability, q.element_size(), head_dim, plan.block_q, plan.block_kv)
    constants = kernel_constants(
        config,
        head_dim=head_dim,
        block_q=plan.block_q,
        block_kv=plan.block_kv,
        short_tail=plan.kv_len % plan.block_kv != 0,
        predicate=predicate(plan.pair_test),
        residual=residual is not None,
        options=options,
        precision=forward_precision(q.dtype == torch.float32, capability),
    )
    indices = plan.indices.contiguous().expand(batch, heads, -1, -1)
    counts = plan.counts.contiguous().expand(batch, heads, -1)
    full_counts = plan.full_counts.contiguous().expand(batch, heads, -1)
    order = longest_first(plan.counts).expand(batch, heads, -1) if options.longest_first else counts
    key_norms = largest_norms(k) if options.softmax == "static" else lse
    test_tensors, test_numbers = test_arguments(plan.pair_test, counts)
    means, listed_strides = centroid_arguments(residual, plan, q, counts)
    forward_kernel[(plan.num_q_blocks * (plan.block_q // config.tile_m), batch * heads)](
        q,
        k,
        v,
        out,
        lse,
        indices,
        counts,
        full_counts,
        order,
        key_norms,
        *test_tensors,
        *means,
        scale * _LOG2_E,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *indices.stride()[:3],
        *counts.stride()[:2],
        *listed_strides,
        heads,
        q_len,
        plan.kv_len,
        *test_numbers,
        **constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
