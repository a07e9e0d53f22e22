"""What the forward kernel reads of a residual: rounded means, log sizes in base 2, and which blocks each row lists."""

# Kernel arguments are device values, for which Python has no types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..residual import Residual
from ..residual_attention import Centroids
from ..sparse_plan import SparsePlan

_TILE = 128


@triton.jit
def listed_kernel(
    Indices,
    Counts,
    Listed,
    list_stride_b,
    list_stride_h,
    list_stride_row,
    count_stride_b,
    count_stride_h,
    heads,
    kv_blocks,
    TILE: tl.constexpr,
):
    """Marks the blocks that one row lists; grid (rows, batch * heads).

    `Listed` is contiguous `[batch, heads, rows, kv_blocks]` and zero.
    """
    row = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    count = tl.load(Counts + batch * count_stride_b + head * count_stride_h + row)
    blocks = Indices + batch * list_stride_b + head * list_stride_h + row.to(tl.int64) * list_stride_row
    marks = Listed + (pair * tl.num_programs(0) + row) * kv_blocks
    offsets = tl.arange(0, TILE)
    for first in tl.range(0, count, TILE):
        inside = first + offsets < count
        tl.store(marks + tl.load(blocks + first + offsets, mask=inside, other=0), 1, mask=inside)


def listed_blocks(plan: SparsePlan) -> Tensor:
    """Expands the lists to a map, as `SparsePlan.to_bool` does, reading no more than the listed ids.

    Args:
        plan: The lists; those of dynamic plans may be as wide as there are blocks, and nearly empty.

    Returns:
        uint8 `[B|1, H|1, NQ, NK]`, contiguous.
    """
    indices, counts = plan.indices.contiguous(), plan.counts.contiguous()
    batch, heads, rows = counts.shape
    listed = torch.zeros(batch, heads, rows, plan.num_kv_blocks, dtype=torch.uint8, device=plan.device)
    listed_kernel[(rows, batch * heads)](
        indices,
        counts,
        listed,
        *indices.stride()[:3],
        *counts.stride()[:2],
        heads,
        plan.num_kv_blocks,
        TILE=_TILE,
        num_warps=4,
    )
    return listed


def centroid_arguments(
    residual: Residual | None, plan: SparsePlan, q: Tensor, unused: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[int, int]]:
    """Lays a residual out for the kernel, on its device and without waiting for it.

    Args:
        residual: What blocks that are not listed contribute, or None.
        plan: The lists, in plan positions.
        q: `[B, H, q_len, D]`; means are rounded to its dtype.
        unused: Any tensor on the device, to be passed where nothing is read.

    Returns:
        `(KMean, VMean, LogSizes, Listed)` and the strides of `Listed` over batch and heads.
    """
    if residual is None:
        return (unused, unused, unused, unused), (0, 0)
    centroids = Centroids.of(residual, q.dtype)
    listed = listed_blocks(plan).expand(*q.shape[:2], -1, -1)
    tensors = (centroids.keys.contiguous(), centroids.values.contiguous(), residual.sizes.log2(), listed)
    return tensors, (listed.stride(0), listed.stride(1))
