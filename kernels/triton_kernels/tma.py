"""Block-sparse flash attention for Hopper: tensor descriptors and warp specialization by Triton's compiler.

One program owns 128 queries.  The compiler gives the loads to a producer warp and splits the queries over two consumer
warpgroups that share each tile of keys, as FlashAttention-3 does by hand (arXiv 2407.08608).  It does so only for four
warps, 2-D descriptors made on the device, and a single loop without any branch: hence the tail mask in every step and
no PARTIAL blocks.  Where one condition fails the compiler drops the specialization without a word, so the tests look
for it in the compiled code (`offline_variants.py`).

Importing this module imports Triton but needs neither a GPU nor a driver.
"""

# Kernel arguments are device values, for which Python has no types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..sparse_plan import SparsePlan
from .hopper import launch_hopper
from .walk import base_of, find_row, keys_ahead, keys_in_tile, tile_start


@triton.jit
def tma_kernel(
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
    HEAD_DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attends one tile of queries; grid (q blocks * tiles per block, batch * heads).

    Args are device pointers, strides in elements (last strides are 1, the others multiples of 16 bytes) and lengths in
    tokens.  `Lse` is contiguous `[B, H, q_len]`.
    """
    tile = tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
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
    # Descriptors read zeros behind the tokens and behind the head dimension.
    queries = tl.make_tensor_descriptor(
        base_of(Q, batch, head, q_stride_b, q_stride_h), [q_len, HEAD_DIM], [q_stride_s, 1], [TILE_M, PAD_DIM]
    )
    keys = tl.make_tensor_descriptor(
        base_of(K, batch, head, k_stride_b, k_stride_h), [kv_len, HEAD_DIM], [k_stride_s, 1], [TILE_N, PAD_DIM]
    )
    values = tl.make_tensor_descriptor(
        base_of(V, batch, head, v_stride_b, v_stride_h), [kv_len, HEAD_DIM], [v_stride_s, 1], [TILE_N, PAD_DIM]
    )

    q = queries.load([tile * TILE_M, 0])
    # A finite lower bound instead of -inf keeps exp2(top - new_top) free of NaN while nothing has been kept.
    top = tl.full([TILE_M], -1.0e30, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, PAD_DIM], tl.float32)
    n_offsets = tl.arange(0, TILE_N)
    ahead = kv_len
    if SHORT_TAIL:
        ahead = keys_ahead(blocks, listed, kv_len, BLOCK_KV)

    STEPS: tl.constexpr = BLOCK_KV // TILE_N
    for step in tl.range(0, listed * STEPS, num_stages=STAGES, warp_specialize=True):
        start = tile_start(blocks, step, BLOCK_KV, TILE_N)
        k = keys.load([start, 0])
        scores = tl.dot(q, k.T)
        if SHORT_TAIL:
            scores = tl.where((n_offsets < keys_in_tile(ahead, step, TILE_N))[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.math.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        top = new_top
        v = values.load([start, 0])
        acc = tl.dot(weights.to(v.dtype), v, acc)

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    m_offsets = tl.arange(0, TILE_M)
    dims = tl.arange(0, PAD_DIM)
    inside = tile * TILE_M + m_offsets < q_len
    tl.store(Lse + tl.program_id(1).to(tl.int64) * q_len + tile * TILE_M + m_offsets, lse, mask=inside)
    out = (acc / total[:, None]).to(Out.dtype.element_ty)
    targets = base_of(Out, batch, head, out_stride_b, out_stride_h) + (tile * TILE_M).to(tl.int64) * out_stride_s
    targets = targets + m_offsets[:, None] * out_stride_s + dims[None, :]
    tl.store(targets, out, mask=inside[:, None] & (dims < HEAD_DIM)[None, :])


def tma_attention(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float, out: Tensor, lse: Tensor) -> None:
    """Launches the kernel; arguments as in `launch_hopper`."""
    launch_hopper(tma_kernel, q, k, v, plan, scale, out, lse)
