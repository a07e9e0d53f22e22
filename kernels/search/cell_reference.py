"""VMoBA as the paper defines it: each single query chooses its cells.  Plain and heavy on memory; for small sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..token_order import inverse_order
from .cell_plan import Scope, Select, gates, select_cells
from .cells import Cells


def query_cell_mask(q: Tensor, k: Tensor, cells: Cells, *, select: Select, scope: Scope, amount: float) -> Tensor:
    """The element mask in which every query keeps the cells that it chose itself.

    Args:
        q: `[B, N, H, D]`.
        k: `[B, N, H, D]`.
        cells: Of the grid; its blocks do not matter.
        select: See `select_cells`.
        scope: See `select_cells`, each query being a row.
        amount: See `select_cells`.

    Returns:
        bool `[B, H, N, N]`, tokens where they are in q and k.  Those in no cell see, and are seen by, all.
    """
    positions = torch.arange(cells.tokens, device=q.device)
    label = torch.repeat_interleave(torch.arange(cells.sizes.numel(), device=q.device), cells.sizes)
    own = torch.zeros(cells.tokens, cells.sizes.numel(), dtype=torch.bool, device=q.device)
    own[positions, label] = True
    kept = select_cells(
        gates(q, k, cells, 1), own, torch.ones_like(positions), select=select, scope=scope, amount=amount
    )
    mask = torch.ones(q.shape[0], q.shape[2], q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
    mask[:, :, : cells.tokens, : cells.tokens] = kept[..., label]
    back = inverse_order(cells.order)
    return mask[:, :, back][..., back]
