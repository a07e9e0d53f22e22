"""The plans that are measured: random blocks, radial attention, and NATTEN's blocked window."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from dit_accel.kernels.pair_tests import Band, Bitmap, Neighborhood, PairTest
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks
from dit_accel.kernels.token_order import plan_in_order, tile_order

Triple = tuple[int, int, int]


def random_plan(
    tokens: int,
    heads: int,
    density: float,
    block_q: int,
    block_kv: int,
    device: torch.device,
    empty_row: int | None = None,
) -> SparsePlan:
    """Equally many random key blocks for every row of every head; none for row `empty_row`."""
    rows, cols = -(-tokens // block_q), -(-tokens // block_kv)
    keep = torch.zeros(heads, rows, cols, dtype=torch.bool, device=device)
    for head in keep:
        kept = torch.rand(rows, cols, device=device).topk(max(1, round(density * cols)), -1).indices
        head.scatter_(-1, kept, True)
    if empty_row is not None:
        keep[:, empty_row] = False
    return plan_from_blocks(
        keep[None], q_len=tokens, kv_len=tokens, block_q=block_q, block_kv=block_kv, method="random"
    )


def banded_plan(tokens: int, frame_tokens: int, block: int, device: torch.device) -> SparsePlan:
    """A band over frames that cuts blocks, so that PARTIAL ones occur, and one row of blocks without any key."""
    frames = -(-tokens // frame_tokens)
    widths = torch.tensor([max(1, frame_tokens >> min(i, 8)) for i in range(frames)], dtype=torch.int32)
    band = Band(frame_tokens, widths.to(device), tokens, sink_tokens=7)
    side = -(-tokens // block)
    keep = torch.ones(side, side, dtype=torch.bool, device=device)
    keep[side // 2] = False
    return plan_from_blocks(
        keep, q_len=tokens, kv_len=tokens, block_q=block, block_kv=block, pair_test=band, method="banded"
    )


def tested_plan(kind: str, tokens: int, block: int, device: torch.device) -> SparsePlan:
    """A plan whose PARTIAL blocks go by the pair test `kind`: "neighborhood" or "bitmap"."""
    test: PairTest
    if kind == "neighborhood":
        # Tokens behind the last whole frame count as text.
        test = Neighborhood.of((tokens // 40, 5, 8), (3, 3, 5), device=device)
    else:
        mask = torch.rand(tokens, tokens, device=device) < 0.3
        test = Bitmap.from_mask(mask, block_q=block, block_kv=block)
    side = -(-tokens // block)
    keep = torch.ones(side, side, dtype=torch.bool, device=device)
    return plan_from_blocks(
        keep, q_len=tokens, kv_len=tokens, block_q=block, block_kv=block, pair_test=test, method=kind
    )


def skewed_plan(tokens: int, heads: int, density: float, block: int, device: torch.device) -> SparsePlan:
    """Random blocks, up to twice as many in the last rows as on average and next to none in the first ones."""
    side = -(-tokens // block)
    wanted = torch.linspace(0, 2 * density, side, device=device)
    keep = torch.rand(heads, side, side, device=device) < wanted[:, None]
    keep |= torch.eye(side, dtype=torch.bool, device=device)
    return plan_from_blocks(keep[None], q_len=tokens, kv_len=tokens, block_q=block, block_kv=block, method="skewed")


def window_plan(
    grid: Triple, tile: Triple, window: Triple, stride: Triple, device: torch.device, *, ordered: bool
) -> SparsePlan:
    """A neighborhood of whole tiles: groups of `stride` queries share a window (arXiv 2504.16922).

    Args:
        grid: Tokens along frames, height, width.
        tile: Tokens of a block along each axis; divides the grid, the window and the stride.
        window: Tokens that a query sees along each axis.
        stride: Queries that share one window, along each axis.
        device: Where the plan is made.
        ordered: Whether `attend` is to permute raster tokens on every call; else they are tile by tile already.

    Raises:
        ValueError: The window cuts tiles.
    """
    tokens, block = math.prod(grid), math.prod(tile)
    tiles, order = -(-tokens // block), tile_order(grid, tile, device)
    plan = plan_from_blocks(
        torch.ones(tiles, tiles, dtype=torch.bool, device=device),
        q_len=tokens,
        kv_len=tokens,
        block_q=block,
        block_kv=block,
        pair_test=Neighborhood.of(grid, window, stride=stride, device=device),
        order=order,
        method="window",
    )
    if not torch.equal(plan.counts, plan.full_counts):
        raise ValueError(f"A window of {window} with stride {stride} cuts tiles of {tile}.")
    # Nothing is left to test, and kernels need not be told to.
    plan = replace(plan, pair_test=None)
    return plan if ordered else plan_in_order(plan, order)
