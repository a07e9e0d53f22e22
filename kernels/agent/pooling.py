"""Agent tokens as averages of queries over the cells of a video grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pooled_agents(
    q: Tensor, grid: tuple[int, int, int], cells: tuple[int, int, int], text: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """Adaptive average pooling of queries over (frames, height, width).

    Cell i of n along an axis of length L covers `[floor(i L / n), ceil((i + 1) L / n))`, as in torch's adaptive
    pooling, so cells overlap by a token where n does not divide L.  An average over a box is the average of averages
    along its axes: pooling axis after axis reads q once, by its strides, and adds up in float32 (float64 for float64).

    Args:
        q: `[B, H, tokens, D]`, any strides; video tokens in raster order.
        grid: Video tokens along (frames, height, width).
        cells: Agents along the same axes, at most as many as tokens.
        text: Ranges `(start, stop)` of tokens that are no video, at the beginning or at the end; they are left out.

    Returns:
        `[B, H, product of cells, D]`, raster order, dtype of q; differentiable.

    Raises:
        ValueError: The grid and the text do not make up the tokens of q, or there are more cells than tokens.
    """
    start = _check(q, grid, cells, text)
    pooled = q.narrow(2, start, grid[0] * grid[1] * grid[2]).unflatten(2, grid)
    for axis, count in ((4, cells[2]), (3, cells[1]), (2, cells[0])):
        pooled = _pool_axis(pooled, axis, count)
    return pooled.flatten(2, 4).to(q.dtype)


def cells_by_tile(grid: tuple[int, int, int], tile: Sequence[int]) -> tuple[int, int, int]:
    """As many cells along each axis as tiles of at most so many tokens take."""
    frames, height, width = (-(-length // side) for length, side in zip(grid, tile, strict=True))
    return frames, height, width


def cells_by_number(grid: tuple[int, int, int], number: int) -> tuple[int, int, int]:
    """At most `number` cells whose sides are as alike as can be: the longest side is cut first, while it may be."""
    cells = [1, 1, 1]
    while True:
        rest = math.prod(cells)
        free = [i for i in range(3) if cells[i] < grid[i] and rest // cells[i] * (cells[i] + 1) <= number]
        if not free:
            return cells[0], cells[1], cells[2]
        cells[max(free, key=lambda i: grid[i] / cells[i])] += 1


def cell_bounds(length: int, cells: int) -> list[tuple[int, int]]:
    """First token and end of each cell along one axis."""
    return [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]


def _pool_axis(x: Tensor, axis: int, cells: int) -> Tensor:
    length, dtype = x.shape[axis], torch.promote_types(x.dtype, torch.float32)
    if length % cells == 0:
        return x.unflatten(axis, (cells, -1)).mean(axis + 1, dtype=dtype)
    parts = [x.narrow(axis, a, b - a).mean(axis, dtype=dtype) for a, b in cell_bounds(length, cells)]
    return torch.stack(parts, axis)


def _check(q: Tensor, grid: tuple[int, int, int], cells: tuple[int, int, int], text: Sequence[tuple[int, int]]) -> int:
    """Returns the first video token."""
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(
            f"q must be floating point [batch, heads, tokens, head_dim], got {q.dtype} of shape {tuple(q.shape)}."
        )
    if len(grid) != 3 or len(cells) != 3 or any(not 1 <= n <= length for n, length in zip(cells, grid, strict=True)):
        raise ValueError(
            f"cells must be three numbers from 1 to the grid's tokens along (frames, height, width); got {cells} for "
            f"a grid of {grid}."
        )
    start, stop = 0, q.shape[2]
    for begin, end in sorted(text):
        if begin == start:
            start = end
    for begin, end in sorted(text, reverse=True):
        if end == stop and begin >= start:
            stop = begin
    if stop - start != grid[0] * grid[1] * grid[2] or sum(b - a for a, b in text) != q.shape[2] - (stop - start):
        raise ValueError(
            f"q has {q.shape[2]} tokens; a grid of {grid} and text at {list(text)} do not make these up. Text must be "
            "at the beginning or the end, and all else on the grid."
        )
    return start
