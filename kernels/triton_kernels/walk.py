"""How a kernel walks the block list of one row, in scalar steps that Triton and Gluon kernels share.

A listed block of `BLOCK_KV` keys is walked in tiles of `TILE_N`.  These kernels take plans whose blocks are all FULL,
so a row's ids ascend and the short block at the end of the keys, if it is listed, comes last.  What a tile may keep is
then plain arithmetic on its step: no second look at the list, no branch.
"""

# Kernel arguments are device values, for which Python has no types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_row(
    Indices, Counts, batch, head, row, list_stride_b, list_stride_h, list_stride_row, count_stride_b, count_stride_h
):
    """Finds the list of a row of blocks: a pointer to its first id, and how many there are."""
    counts = Counts + batch.to(tl.int64) * count_stride_b + head.to(tl.int64) * count_stride_h
    blocks = Indices + batch.to(tl.int64) * list_stride_b + head.to(tl.int64) * list_stride_h
    return blocks + row.to(tl.int64) * list_stride_row, tl.load(counts + row)


@triton.jit
def tile_start(blocks, step, BLOCK_KV: tl.constexpr, TILE_N: tl.constexpr):
    """First key of the tile that the walk reaches at `step`."""
    STEPS: tl.constexpr = BLOCK_KV // TILE_N
    return tl.load(blocks + step // STEPS) * BLOCK_KV + (step % STEPS) * TILE_N


@triton.jit
def keys_ahead(blocks, listed, kv_len, BLOCK_KV: tl.constexpr):
    """Keys from the first tile on, were all listed blocks whole but the last; see `keys_in_tile`."""
    final = tl.load(blocks + listed - 1, mask=listed > 0, other=0)
    return kv_len - final * BLOCK_KV + (listed - 1) * BLOCK_KV


@triton.jit
def keys_in_tile(ahead, step, TILE_N: tl.constexpr):
    """Keys of the tile at `step` that exist: `TILE_N` or more before the last block; 0 or less behind the end."""
    return ahead - step * TILE_N


@triton.jit
def base_of(tensor, batch, head, stride_b, stride_h):
    """Pointer to the first token of one head."""
    return tensor + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
