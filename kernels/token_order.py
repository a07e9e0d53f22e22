"""Orders of video tokens in which neighbors in space and time are neighbors in the sequence.

A block of a plan is a run of positions; what it covers in the video depends on the order.  An order is a permutation
`[N]` int64 as in `SparsePlan.order`: position p holds raster token `order[p]`, raster being frame after frame, row
after row.  All orders here take any grid: nothing is padded, tiles and curves are cut at its border.

Sources: tile-major order as in Generalized Neighborhood Attention (arXiv 2504.16922), pixel-major as in Sparse
VideoGen (arXiv 2502.01776), Morton's curve as in Sol-Attn (arXiv 2607.24027).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .permute import inverse_order as inverse_order
from .sparse_plan import SparsePlan

Grid = tuple[int, int, int]

_MORTON_BITS = 21  # three axes of 21 bits fill the 63 value bits of an int64


def raster_order(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """Frame after frame, row after row: the identity.

    Args:
        grid: Tokens along (frames, height, width), each at least 1.
        device: Where the order is made; the CPU by default.

    Returns:
        int64 `[frames * height * width]`.

    Raises:
        ValueError: A side of the grid is below 1; so in all orders.
    """
    _check_sides("grid", grid)
    return torch.arange(grid[0] * grid[1] * grid[2], device=device)


def tile_order(grid: Grid, tile: Grid, device: torch.device | str | None = None) -> Tensor:
    """Tile after tile in raster order of tiles, raster order inside each.

    Tiles at the far borders hold what is left there; each tile, whole or not, is one run of positions.

    Args:
        grid: Tokens along (frames, height, width).
        tile: Tokens of one tile along the same axes; may be larger than the grid.
        device: Where the order is made.

    Returns:
        int64 `[frames * height * width]`.

    Raises:
        ValueError: A side of the grid or of the tile is below 1.
    """
    _check_sides("tile", tile)
    which = inside = torch.zeros((), dtype=torch.int64, device=device)
    for coordinate, length, side in zip(_coordinates(grid, device), grid, tile, strict=True):
        which = which * -(-length // side) + coordinate // side
        inside = inside * side + coordinate % side
    return torch.argsort(which * (tile[0] * tile[1] * tile[2]) + inside)


def pixel_order(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """Pixel-major: all frames of one place, then those of the next place.

    Its inverse leads back: it is the pixel-major order of a `(height * width, frames, 1)` grid.

    Args:
        grid: Tokens along (frames, height, width).
        device: Where the order is made.

    Returns:
        int64 `[frames * height * width]`.
    """
    return raster_order(grid, device).view(grid[0], -1).transpose(0, 1).flatten()


def morton_order(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """Along Morton's curve (Z-order): by the number whose bits are those of frame, row and column in turn.

    The lowest bit is the column's, then the row's, then the frame's.  Numbers outside the grid are passed over.

    Args:
        grid: Tokens along (frames, height, width), at most 2 ** 21 each.
        device: Where the order is made.

    Returns:
        int64 `[frames * height * width]`.

    Raises:
        ValueError: A side of the grid is below 1 or above 2 ** 21.
    """
    if max(grid) > 1 << _MORTON_BITS:
        raise ValueError(f"Morton order takes at most {1 << _MORTON_BITS} tokens along an axis, got {grid}.")
    frame, row, column = _coordinates(grid, device)
    code = torch.zeros((), dtype=torch.int64, device=device)
    for bit in range((max(grid) - 1).bit_length()):
        for axis, coordinate in enumerate((column, row, frame)):
            code = code | ((coordinate >> bit) & 1) << (3 * bit + axis)
    return torch.argsort(code.expand(frame.shape))


def with_text(order: Tensor, *, before: int = 0, after: int = 0) -> Tensor:
    """Extends an order of video tokens by text tokens, which keep their places.

    Args:
        order: int64 `[N]`.
        before: Text tokens in front of the video.
        after: Text tokens behind it.

    Returns:
        int64 `[before + N + after]`.

    Raises:
        ValueError: A negative number of text tokens.
    """
    if before < 0 or after < 0:
        raise ValueError(f"The numbers of text tokens must not be negative, got {before} before and {after} after.")
    start = before + order.numel()
    head = torch.arange(before, device=order.device)
    return torch.cat([head, order + before, torch.arange(start, start + after, device=order.device)])


def check_order(order: Tensor, tokens: int) -> None:
    """Makes sure that an order is a permutation of `tokens` tokens.  Reads the answer back from the device.

    Raises:
        ValueError: Another dtype or shape, or a token that is missing.
    """
    if order.dtype != torch.int64 or tuple(order.shape) != (tokens,):
        raise ValueError(
            f"A token order for {tokens} tokens must be int64 of shape ({tokens},), got {order.dtype} of shape "
            f"{tuple(order.shape)}. Build it for this grid, and add text tokens by with_text()."
        )
    if not torch.equal(order.sort().values, torch.arange(tokens, device=order.device)):
        raise ValueError(
            f"A token order must name each of its {tokens} tokens once; some are missing or out of range."
        )


def plan_in_order(plan: SparsePlan, order: Tensor) -> SparsePlan:
    """The same plan for tensors whose tokens have been permuted already, as inside a permuted stack of blocks.

    The result has no order of its own iff the plan was built for this very order; `attend` then permutes nothing.  Any
    other plan, one of raster tokens among them, stays correct: it keeps an order, now relative to the permuted tokens,
    and every call pays for it.  Compares the two orders on the host; call it once per plan, not in the hot path.

    Args:
        plan: A plan for raster tokens; its `order` is None or a permutation.
        order: How the tensors are permuted: position p holds raster token `order[p]`.

    Returns:
        A plan whose element mask at (p, q) is that of `plan` at `(order[p], order[q])`.

    Raises:
        ValueError: The plan is not for as many queries and keys as the order has tokens.
    """
    if plan.q_len != order.numel() or plan.kv_len != order.numel():
        raise ValueError(
            f"The plan is for {plan.q_len} queries and {plan.kv_len} keys, but the order permutes {order.numel()} "
            "tokens. Only self-attention over all permuted tokens can be planned in their order."
        )
    with torch.inference_mode(False):  # the plan is kept, and may be used in training later
        return _moved(plan, order.to(plan.device))


def _moved(plan: SparsePlan, order: Tensor) -> SparsePlan:
    positions = inverse_order(order)
    if plan.kv_order is not None:
        q_order = positions if plan.order is None else positions[plan.order]
        return replace(plan, order=q_order, kv_order=positions[plan.kv_order])
    if plan.order is not None:
        positions = positions[plan.order]
    same = bool((positions == torch.arange(order.numel(), device=order.device)).all())
    return replace(plan, order=None if same else positions)


def _coordinates(grid: Grid, device: torch.device | str | None) -> tuple[Tensor, Tensor, Tensor]:
    tokens = raster_order(grid, device)
    frame_tokens = grid[1] * grid[2]
    return tokens // frame_tokens, tokens % frame_tokens // grid[2], tokens % grid[2]


def _check_sides(name: str, sides: Grid) -> None:
    if len(sides) != 3 or min(sides) < 1:
        raise ValueError(f"A {name} is (frames, height, width), each at least 1; got {sides}.")
