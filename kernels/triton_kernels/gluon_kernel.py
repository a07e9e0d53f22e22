"""Block-sparse flash attention for Hopper in Gluon: the device code.

One producer warp loads tiles of keys and values into a ring of shared memory; two consumer warpgroups own 64 queries
each and share the tiles.  A consumer starts the scores of tile i, then the output of tile i - 1, and computes the
softmax of tile i while that product runs (FlashAttention-3, arXiv 2407.08608).

Importing this module fails where Triton's Gluon is missing or lacks a part; import `gluon_hopper` instead.
"""

# Kernel arguments are device values, for which Python has no types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .walk import base_of, find_row, keys_ahead, keys_in_tile, tile_start

# Triton 3.6 has the longer name, later ones only the shorter.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _produce(
    queries,
    keys,
    values,
    blocks,
    steps,
    first,
    shared,
    BLOCK_KV: gl.constexpr,
    TILE_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warp: one tile of queries per consumer, then the listed tiles of keys and values."""
    q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty = shared
    # A program must not end with a load under way, and without steps nobody waits for any.
    if steps > 0:
        for part in gl.static_range(2):
            mbarrier.expect(q_full.index(part), queries.block_type.nbytes)
            load_tile(queries, [first + part * 64, 0], q_full.index(part), q_tiles.index(part))
    for step in range(steps):
        slot = step % STAGES
        phase = (step // STAGES) & 1
        start = tile_start(blocks, step, BLOCK_KV, TILE_N)
        # A fresh barrier counts as one phase past, so the first round does not wait.
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), keys.block_type.nbytes)
        load_tile(keys, [start, 0], k_full.index(slot), k_tiles.index(slot))
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
        mbarrier.expect(v_full.index(slot), values.block_type.nbytes)
        load_tile(values, [start, 0], v_full.index(slot), v_tiles.index(slot))


@gluon.jit
def _softmax_step(
    scores,
    ahead,
    step,
    top,
    total,
    scale_log2,
    LAYOUT: gl.constexpr,
    TILE_N: gl.constexpr,
    SHORT_TAIL: gl.constexpr,
):
    """Weights of one tile, and what they make of the running maximum and sum."""
    if SHORT_TAIL:
        offsets = gl.arange(0, TILE_N, layout=gl.SliceLayout(0, LAYOUT))
        scores = gl.where((offsets < keys_in_tile(ahead, step, TILE_N))[None, :], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return weights, new_top, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _consume(
    part: gl.constexpr,
    rows,
    shared,
    HEAD_DIM: gl.constexpr,
    PAD_DIM: gl.constexpr,
    TILE_N: gl.constexpr,
    STAGES: gl.constexpr,
    SHORT_TAIL: gl.constexpr,
):
    """A consumer warpgroup: attends its 64 queries."""
    Out, Lse, out_stride_s, scale_log2, q_len, steps, ahead, first = rows
    q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty = shared
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAD_DIM, 16])
    W_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = k_tiles.dtype
    # A finite lower bound instead of -inf keeps exp2(top - new_top) free of NaN while nothing has been kept.
    top = gl.full([64], -1.0e30, gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    total = gl.full([64], 0.0, gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    acc = gl.full([64, PAD_DIM], 0.0, gl.float32, layout=O_LAYOUT)
    zeros = gl.full([64, TILE_N], 0.0, gl.float32, layout=S_LAYOUT)
    q = q_tiles.index(part)
    if steps > 0:
        mbarrier.wait(q_full.index(part), 0)
        mbarrier.wait(k_full.index(0), 0)
        pending = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[pending])
        mbarrier.arrive(k_empty.index(0), count=1)
        weights, top, total, shrink = _softmax_step(
            scores, ahead, 0, top, total, scale_log2, S_LAYOUT, TILE_N, SHORT_TAIL
        )
        weights = gl.convert_layout(weights.to(dtype), W_LAYOUT)
        for step in range(1, steps):
            slot = step % STAGES
            before = (step - 1) % STAGES
            mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
            pending = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
            pending_out = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[pending])
            mbarrier.arrive(k_empty.index(slot), count=1)
            new, top, total, shrink = _softmax_step(
                scores, ahead, step, top, total, scale_log2, S_LAYOUT, TILE_N, SHORT_TAIL
            )
            # The weights are read from registers until this wait, so they are named in it.
            acc, weights = warpgroup_mma_wait(0, deps=[pending_out, weights])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
            weights = gl.convert_layout(new.to(dtype), W_LAYOUT)
        before = (steps - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((steps - 1) // STAGES) & 1)
        pending_out = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=[pending_out, weights])

    some = total > 0.0
    total = gl.where(some, total, 1.0)
    lse = gl.where(some, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
    q_pos = first + part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    gl.store(Lse + q_pos, lse, mask=q_pos < q_len)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]
    m_offsets = gl.arange(0, 64, layout=gl.SliceLayout(1, O_LAYOUT))
    dims = gl.arange(0, PAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
    inside = first + part * 64 + m_offsets < q_len
    # The start goes into the pointer in 64 bits, so that offsets within the tile stay small 32-bit numbers.
    Out += (first + part * 64).to(gl.int64) * out_stride_s
    targets = Out + m_offsets[:, None] * out_stride_s + dims[None, :]
    gl.store(targets, acc.to(Out.dtype.element_ty), mask=inside[:, None] & (dims < HEAD_DIM)[None, :])


@gluon.jit
def gluon_kernel(
    Q,
    K,
    V,
    Out,
    Lse,
    Indices,
    Counts,
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
    heads,
    q_len,
    kv_len,
    HEAD_DIM: gl.constexpr,
    PAD_DIM: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    TILE_M: gl.constexpr,
    TILE_N: gl.constexpr,
    SHORT_TAIL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attends one tile of queries; grid and arguments as in `tma_kernel`."""
    tile = gl.program_id(0)
    batch = gl.program_id(1) // heads
    head = gl.program_id(1) % heads
    blocks, listed = find_row(
        Indices,
        Counts,
        batch,
        head,
        tile // (BLOCK_Q // TILE_M),
        list_stride_b,
        list_stride_h,
        list_stride_row,
        count_stride_b,
        count_stride_h,
    )
    steps = listed * (BLOCK_KV // TILE_N)
    ahead = kv_len
    if SHORT_TAIL:
        ahead = keys_ahead(blocks, listed, kv_len, BLOCK_KV)
    first = tile * TILE_M

    dtype: gl.constexpr = Q.dtype.element_ty
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, PAD_DIM], dtype)
    KV_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_N, PAD_DIM], dtype)
    # Descriptors read zeros behind the tokens and behind the head dimension.
    queries = tma.make_tensor_descriptor(
        base_of(Q, batch, head, q_stride_b, q_stride_h), [q_len, HEAD_DIM], [q_stride_s, 1], [64, PAD_DIM], Q_LAYOUT
    )
    keys = tma.make_tensor_descriptor(
        base_of(K, batch, head, k_stride_b, k_stride_h),
        [kv_len, HEAD_DIM],
        [k_stride_s, 1],
        [TILE_N, PAD_DIM],
        KV_LAYOUT,
    )
    values = tma.make_tensor_descriptor(
        base_of(V, batch, head, v_stride_b, v_stride_h),
        [kv_len, HEAD_DIM],
        [v_stride_s, 1],
        [TILE_N, PAD_DIM],
        KV_LAYOUT,
    )
    Out = base_of(Out, batch, head, out_stride_b, out_stride_h)
    Lse += gl.program_id(1).to(gl.int64) * q_len

    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, PAD_DIM], Q_LAYOUT)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE_N, PAD_DIM], KV_LAYOUT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE_N, PAD_DIM], KV_LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        # One arrival per load; a slot is empty when both consumers have read it.
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    shared = (q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty)
    rows = (Out, Lse, out_stride_s, scale_log2, q_len, steps, ahead, first)
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), rows, shared, HEAD_DIM, PAD_DIM, TILE_N, STAGES, SHORT_TAIL)),
            (_consume, (gl.constexpr(1), rows, shared, HEAD_DIM, PAD_DIM, TILE_N, STAGES, SHORT_TAIL)),
            (_produce, (queries, keys, values, blocks, steps, first, shared, BLOCK_KV, TILE_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
