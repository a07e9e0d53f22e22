"""Small pictures of who attends to whom: the mass of blocks, and the blocks that plans list."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.sparse_plan import SparsePlan
from ..layout import TokenLayout

SIDE = 32  # cells along queries and along keys, if there are as many tokens


def mass_picture(mass: Tensor, tokens: int, block: int, side: int = SIDE) -> Tensor:
    """Attention between cells, each a run of visual tokens; 1 everywhere if attention is uniform.

    Args:
        mass: ``[batch, heads, query blocks, key blocks]``, rows that sum to 1.
        tokens: visual tokens.
        block: tokens per block of ``mass``.
        side: cells along each axis; at most the number of blocks is used.

    Returns:
        float32 ``[heads, cells, cells]``, averaged over the batch.
    """
    side = min(side, mass.shape[-1])
    position = torch.arange(tokens, device=mass.device)
    overlap = _overlap(cell_of(position, tokens, side), position // block, side, mass.shape[-1])
    cells = overlap.sum(1)
    rows = overlap / cells[:, None]
    columns = overlap / overlap.sum(0)
    return rows @ mass.mean(0) @ columns.T * (tokens / cells)


def mask_picture(plan: SparsePlan, layout: TokenLayout, side: int = SIDE) -> Tensor:
    """The part of each cell that lies in blocks which a plan lists, pairs of visual tokens in raster order.

    Blocks that an element test cuts count as whole: they are computed whole.

    Args:
        plan: for tokens of the layout, in any order of its own.
        layout: in raster order.
        side: cells along each axis; at most the number of visual tokens is used.

    Returns:
        float32 ``[heads or 1, cells, cells]``, averaged over the batch.
    """
    start, stop = layout.visual
    side = min(side, stop - start)
    listed, rows, columns = plan.to_bool().float(), _order(plan.order, plan), _order(plan.key_order, plan)
    lead = torch.broadcast_shapes(listed.shape[:2], rows.shape[:2], columns.shape[:2])
    listed, rows, columns = (part.expand(*lead, *part.shape[2:]) for part in (listed, rows, columns))
    picture = torch.zeros(lead[1], side, side, device=plan.device)
    for batch in range(lead[0]):
        for head in range(lead[1]):
            ours = _shares(rows[batch, head], layout.visual, plan.block_q, plan.num_q_blocks, side)
            theirs = _shares(columns[batch, head], layout.visual, plan.block_kv, plan.num_kv_blocks, side)
            picture[head] += ours @ listed[batch, head] @ theirs.T / lead[0]
    return picture


def cell_of(position: Tensor, tokens: int, side: int) -> Tensor:
    """The cell, of ``side`` nearly equal ones, that a visual token lies in."""
    return position * side // tokens


def _order(order: Tensor | None, plan: SparsePlan) -> Tensor:
    """Which token stands where, ``[batch or 1, heads or 1, tokens]``."""
    order = torch.arange(plan.q_len, device=plan.device) if order is None else order
    return order.expand(1, 1, -1) if order.ndim == 1 else order


def _shares(order: Tensor, visual: tuple[int, int], block: int, blocks: int, side: int) -> Tensor:
    """Which part of each cell lies in each block of plan positions: ``[cells, blocks]``."""
    start, stop = visual
    place = torch.nonzero((order >= start) & (order < stop))[:, 0]
    overlap = _overlap(cell_of(order[place] - start, stop - start, side), place // block, side, blocks)
    return overlap / overlap.sum(1, keepdim=True)


def _overlap(cell: Tensor, block: Tensor, cells: int, blocks: int) -> Tensor:
    """How many tokens lie in a cell and in a block: float32 ``[cells, blocks]``."""
    return torch.bincount(cell * blocks + block, minlength=cells * blocks).reshape(cells, blocks).float()
