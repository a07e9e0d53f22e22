"""A few block masks, each in a token order of its own, of which every head takes one.

All of them are listed before the first call, so a choice is a look-up on the device and waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pair_tests import block_area
from ..sparse_plan import PlanStats, SparsePlan


class Masks(NamedTuple):
    """What heads choose among.

    Attributes:
        indices: int32 `[C, NQ, K]`, the key blocks that each row of each mask keeps, ascending, then zeros.
        counts: int32 `[C, NQ]`, how many.
        orders: int64 `[C, N]`, in which order each mask sees the tokens, as in `SparsePlan.order`.
        block: Tokens per block.
        video: Positions at the beginning of all orders that hold video tokens.
        densities: Of each mask, kept pairs over all pairs of the sequence.
    """

    indices: Tensor
    counts: Tensor
    orders: Tensor
    block: int
    video: int
    densities: tuple[float, ...]


class Listed(NamedTuple):
    """One mask.

    Attributes:
        blocks: bool `[NQ, NQ]`, query blocks by key blocks; no row without a block.
        indices: int32 `[NQ, K]`, the blocks of each row, ascending, then zeros.
        counts: int32 `[NQ]`, how many.
        density: Kept pairs over all pairs.
    """

    blocks: Tensor
    indices: Tensor
    counts: Tensor
    density: float


def listed(blocks: Tensor, length: int, block: int) -> Listed:
    """Lists the blocks of a mask.  Reads a few numbers back; call it outside the hot path.

    Args:
        blocks: bool `[NQ, NQ]`.
        length: Tokens of the sequence.
        block: Tokens per block.

    Returns:
        The mask, where it was.
    """
    area = block_area(length, length, block, block, blocks.device)
    counts = blocks.sum(-1, dtype=torch.int32)
    width = int(counts.max())
    indices = torch.argsort((~blocks).to(torch.uint8), dim=-1, stable=True)[:, :width].to(torch.int32)
    indices = torch.where(torch.arange(width, device=blocks.device) < counts[:, None], indices, 0)
    return Listed(blocks, indices, counts, float(area[blocks].sum()) / length**2)


def stacked(masks: Sequence[Listed], orders: Tensor, *, block: int, video: int) -> Masks:
    """Puts masks with their orders together.

    Args:
        masks: One or more, for as many blocks each.
        orders: int64 `[C, N]`.
        block: Tokens per block.
        video: Video tokens, the first ones of every order.

    Returns:
        All of it on the device of `orders`.
    """
    width = max(mask.indices.shape[1] for mask in masks)
    indices = [torch.nn.functional.pad(mask.indices, (0, width - mask.indices.shape[1])) for mask in masks]
    counts = torch.stack([mask.counts for mask in masks]).to(orders.device)
    densities = tuple(mask.density for mask in masks)
    return Masks(torch.stack(indices).to(orders.device), counts, orders, block, video, densities)


def chosen_plan(masks: Masks, choice: Tensor, shift: Tensor | None = None, **details: Any) -> SparsePlan:
    """The plan in which every head follows its mask.  Traceable, and never waits for the device.

    Args:
        masks: What there is to choose.
        choice: int64 `[B, H]`, which of them.
        shift: int64 `[B, H]`: the video tokens that are first in a head's order go to the end of the video, so many
            of them.  None: they stay.
        details: For `PlanStats.details`.

    Returns:
        The plan, with lists and orders per batch item and head; its density is NaN until it is counted.
    """
    order = masks.orders[choice]
    if shift is not None:
        places = (torch.arange(masks.video, device=order.device) + shift[..., None]) % masks.video
        order = torch.cat((order.gather(-1, places), order[..., masks.video :]), -1)
    counts, length = masks.counts[choice], masks.orders.shape[1]
    return SparsePlan(
        q_len=length,
        kv_len=length,
        block_q=masks.block,
        block_kv=masks.block,
        indices=masks.indices[choice],
        counts=counts,
        full_counts=counts,
        stats=PlanStats(math.nan, (), "grid", details),
        order=order,
    )
