"""List inversion: from the key blocks of each query row to the query rows of each key block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ColumnLists:
    """Query blocks that list each key block, as compressed sparse columns.

    Compressed rather than padded: how often the most popular key block is listed is only known on the device, and
    waiting for that number would stall the host.  This form needs no more entries than the row lists have slots.

    Attributes:
        rows: int32 `[B|1, H|1, NQ * K]`, query blocks, column after column; zeros behind the last one.
        bounds: int32 `[B|1, H|1, 2 * NK + 1]`.  Rows `bounds[2 * c]` to `bounds[2 * c + 1]` list column
            c as FULL, those up to `bounds[2 * c + 2]` as PARTIAL; both parts ascend.
    """

    rows: Tensor
    bounds: Tensor


def invert_lists(indices: Tensor, counts: Tensor, full_counts: Tensor, num_kv_blocks: int) -> ColumnLists:
    """Transposes padded row lists on their device, without waiting for it and without atomics.

    Args:
        indices: int32 `[B|1, H|1, NQ, K]`, see `SparsePlan.indices`.
        counts: int32 `[B|1, H|1, NQ]`, see `SparsePlan.counts`.
        full_counts: int32, same shape; pass `counts` where every listed block is FULL.
        num_kv_blocks: Key blocks, NK.

    Returns:
        The column lists, on the device of `indices`.
    """
    capacity = indices.shape[-1]
    slots = torch.arange(capacity, device=indices.device)
    partial = slots >= full_counts[..., None]
    end = 2 * num_kv_blocks
    keys = torch.where(slots < counts[..., None], indices * 2 + partial, end).to(torch.int32)
    # Entries start out row by row, so a stable sort leaves the rows of each column ascending.
    keys, source = torch.sort(keys.flatten(-2), dim=-1, stable=True)
    rows = torch.where(keys < end, source // capacity, 0).to(torch.int32)
    edges = torch.arange(end + 1, dtype=torch.int32, device=indices.device)
    edges = edges.expand(*keys.shape[:-1], end + 1).contiguous()
    return ColumnLists(rows, torch.searchsorted(keys, edges, out_int32=True))
