"""Tiles of neighborhood attention: the token order they give, and how many pairs are kept between blocks of it.

Along each dimension tokens that see each other at a dilation, `i mod dilation` alike, form a group; tiles are boxes
within groups.  The mask of neighborhood attention is a product over dimensions, so the pairs it keeps between two
boxes are a product of three small counts.  Blocks are made of boxes, hence exact counts at the cost of one table.

Source of the order: Hassani et al., "Generalized Neighborhood Attention", arXiv 2504.16922, token permutation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.pair_tests import Neighborhood

Grid = tuple[int, int, int]

_CHUNK = 1 << 22  # entries of one temporary while pairs are counted


@dataclass(frozen=True)
class NeighborhoodShape:
    """The numbers of neighborhood attention on one grid; each is `(frames, rows, columns)`.

    Attributes:
        grid: Tokens of the grid.
        window: Keys of a query.
        stride: Queries that share a window.
        dilation: Distance between the keys of a window.
        causal: Whether queries see no later keys.
        tile: Tokens of a tile; the token order is tile after tile.
    """

    grid: Grid
    window: Grid
    stride: Grid
    dilation: Grid
    causal: tuple[bool, bool, bool]
    tile: Grid

    def pair_test(self, *, raster: Tensor | None = None, device: torch.device | str = "cpu") -> Neighborhood:
        """The element test, see `Neighborhood.of`."""
        return Neighborhood.of(
            self.grid,
            self.window,
            stride=self.stride,
            dilation=self.dilation,
            causal=self.causal,
            raster=raster,
            device=device,
        )

    def along(self, axis: int) -> Neighborhood:
        """The element test of one dimension; the whole test is the product of the three."""
        numbers = (self.window[axis], self.stride[axis], self.dilation[axis], self.causal[axis])
        window, stride, dilation, causal = numbers
        return Neighborhood.of(self.grid[axis : axis + 1], window, stride=stride, dilation=dilation, causal=causal)

    def details(self) -> dict[str, Any]:
        """All numbers by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class AxisTiles:
    """Where the coordinates of one dimension lie; all int64 `[length]`.

    Attributes:
        number: Of the tile.
        inside: Place inside the tile.
        short: 1 where the border of the group cuts the tile, else 0.
        sorted: Place when the groups follow each other; a tile is a range of it.
    """

    number: Tensor
    inside: Tensor
    short: Tensor
    sorted: Tensor

    @classmethod
    def cut(cls, length: int, side: int, dilation: int, device: torch.device | str = "cpu") -> AxisTiles:
        """Cuts a dimension into tiles."""
        index = torch.arange(length, device=device)
        group, place = index % dilation, index // dilation
        least, longer = length // dilation, length % dilation
        longest = -(-length // dilation)
        tiles = -(-longest // side)  # shorter groups may leave a number unused
        short = (place // side + 1) * side > least + (group < longer)
        start = group * least + group.clamp(max=longer)
        return cls(group * tiles + place // side, place % side, short.to(torch.int64), start + place)


def neighborhood_order(shape: NeighborhoodShape, device: torch.device | str = "cpu") -> Tensor:
    """Whole tiles first, then what is left at the borders; each in raster order of tiles and inside them.

    So whole tiles of as many tokens as a block has lie exactly in blocks, on any grid.

    Args:
        shape: The grid, its tile and its dilation.
        device: Where the order is made.

    Returns:
        int64 `[tokens]`: position p holds raster token `order[p]`.
    """
    number, inside, short, _ = _over_grid(shape, device)
    tiles = int(number.max()) + 1
    return torch.argsort((short * tiles + number) * math.prod(shape.tile) + inside)


def pairs_in_tile_order(shape: NeighborhoodShape, length: int, block: int) -> Tensor:
    """Counts the kept pairs between blocks of the sequence `[grid in tile order, text]`, exactly.

    Args:
        shape: The neighborhood.
        length: Tokens in all; what exceeds the grid is text, which sees and is seen by everything.
        block: Tokens per block.

    Returns:
        int64 `[blocks, blocks]` on the CPU.
    """
    blocks, visual = -(-length // block), math.prod(shape.grid)
    owner, boxes = _boxes(shape, block)
    tables = []
    for axis, box in enumerate(boxes):
        place = AxisTiles.cut(shape.grid[axis], shape.tile[axis], shape.dilation[axis]).sorted.argsort()
        kept = shape.along(axis).keeps(place[:, None], place[None]).to(torch.int64)
        sums = torch.nn.functional.pad(kept.cumsum(0).cumsum(1), (1, 0, 1, 0))
        tables.append(sums[box[1]] - sums[box[0]])
    total = torch.zeros(blocks, blocks, dtype=torch.int64)
    step = max(1, _CHUNK // len(owner))
    for start in range(0, len(owner), step):
        rows = slice(start, start + step)
        pairs = torch.ones((), dtype=torch.int64)
        for table, box in zip(tables, boxes, strict=True):
            pairs = pairs * (table[rows][:, box[1]] - table[rows][:, box[0]])
        by_block = torch.zeros(pairs.shape[0], blocks, dtype=torch.int64).index_add_(1, owner, pairs)
        total.index_add_(0, owner[rows], by_block)
    starts = torch.arange(0, length, block)
    sizes, seen = (length - starts).clamp(max=block), (visual - starts).clamp(0, block)
    return total + sizes[:, None] * sizes - seen[:, None] * seen


def _over_grid(shape: NeighborhoodShape, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Of every token in raster order: tile, place inside it, whether it is cut, and sorted place along each axis."""
    number = inside = short = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    places = []
    for axis, (length, side) in enumerate(zip(shape.grid, shape.tile, strict=True)):
        tiles = AxisTiles.cut(length, side, shape.dilation[axis], device)
        view = [length if i == axis else 1 for i in range(3)]
        number = number * (int(tiles.number.max()) + 1) + tiles.number.view(view)
        inside = inside * side + tiles.inside.view(view)
        short = short | tiles.short.view(view)
        places.append(tiles.sorted.view(view).expand(shape.grid).flatten())
    return number.flatten(), inside.flatten(), short.flatten(), places


def _boxes(shape: NeighborhoodShape, block: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Cuts blocks into boxes: whole tiles; planes, then runs of a row, where the end of a block cuts a tile.

    Returns:
        the block of each box, and along each axis its first sorted place and the one behind its last.
    """
    number, inside, _, places = _over_grid(shape, "cpu")
    order = neighborhood_order(shape)
    number, inside = number[order], inside[order]
    position = torch.arange(len(order))
    block_of = position // block
    plane, row = shape.tile[1] * shape.tile[2], shape.tile[2]
    tile_id = _runs(number)
    plane_id = _runs(tile_id, inside // plane)
    row_id = _runs(tile_id, inside // row)
    unit = _runs(block_of, tile_id, plane_id * _cut(tile_id, block_of), row_id * _cut(plane_id, block_of))
    count = int(unit[-1]) + 1
    owner = torch.zeros(count, dtype=torch.int64).scatter_(0, unit, block_of)
    boxes = []
    for place in places:
        ends = torch.zeros(2, count, dtype=torch.int64)
        for i, how in enumerate(("amin", "amax")):
            ends[i].scatter_reduce_(0, unit, place[order], how, include_self=False)
        boxes.append((ends[0], ends[1] + 1))
    return owner, boxes


def _runs(*labels: Tensor) -> Tensor:
    """Numbers the runs of positions whose labels are all equal."""
    new = torch.zeros(len(labels[0]), dtype=torch.bool)
    for label in labels:
        new[1:] |= label[1:] != label[:-1]
    return new.cumsum(0)


def _cut(run: Tensor, block_of: Tensor) -> Tensor:
    """1 at positions whose run lies in several blocks, else 0."""
    count = int(run[-1]) + 1
    first = torch.zeros(count, dtype=torch.int64).scatter_reduce_(0, run, block_of, "amin", include_self=False)
    last = torch.zeros(count, dtype=torch.int64).scatter_reduce_(0, run, block_of, "amax", include_self=False)
    return (first != last)[run].to(torch.int64)
