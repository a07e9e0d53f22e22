"""Neighborhood attention: every token sees a window of tokens around it, in space and in time.

Source: Hassani et al., "Generalized Neighborhood Attention", arXiv 2504.16922, with the window, stride, dilation and
causality of NATTEN.  `Neighborhood` (`kernels/pair_tests.py`) has the formula.  Here its numbers are found for a
grid, tokens are put in the order of tiles, so that a block of the plan is a box of the video, and the plan is built.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from dit_accel.kernels.pair_tests import Neighborhood, block_area, blocks_of
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

from .tiles import AxisTiles, Grid, NeighborhoodShape, neighborhood_order, pairs_in_tile_order

Whole: TypeAlias = int | Sequence[int]
Window: TypeAlias = int | float | Sequence[int | float]
Stride: TypeAlias = int | Sequence[int] | Literal["tile"]
Dilation: TypeAlias = int | Sequence[int] | Literal["widest"]

AXES = ("frames", "rows", "columns")
USUAL_WINDOW = 0.6

_COUNTED_TILES, _COUNTED_TOKENS = 8, 1 << 14  # tiles that are compared by their blocks, and on grids up to which size


@dataclass(frozen=True, eq=False)
class _TiledNeighborhood(Neighborhood):
    """The element test of a plan in tile order, which counts its pairs by boxes: minutes become milliseconds."""

    shape: NeighborhoodShape | None = None

    def pairs_per_block(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Tensor:
        """As of any neighborhood; by boxes where queries and keys are cut alike."""
        if self.shape is None or (q_len, block_q) != (kv_len, block_kv) or q_len < self.video_len:
            return super().pairs_per_block(q_len, kv_len, block_q, block_kv)
        return pairs_in_tile_order(self.shape, q_len, block_q).to(self.ranges.device)


def neighborhood_plan(
    grid: Grid,
    *,
    window: Window = USUAL_WINDOW,
    stride: Stride = 1,
    dilation: Dilation = 1,
    causal: bool | Sequence[bool] = False,
    tile: Whole | None = None,
    snap: bool = False,
    block: int = 128,
    before: int = 0,
    after: int = 0,
    device: torch.device | str = "cpu",
) -> SparsePlan:
    """Builds the plan of neighborhood attention for one token grid.

    The sequence is `[before, grid, after]`, the grid in raster order; tokens before and after it are text, which sees
    and is seen by everything.  The plan's own order has the grid first, in tiles, and the text behind it.

    Each setting is one number for every dimension, or one number each for (frames, rows, columns), or for
    (rows, columns) where the grid has one frame.  Then one number says nothing of the frame.

    Args:
        grid: Tokens as (frames, height, width); images have one frame.
        window: Keys of a query in each dimension: an int counts tokens, a float is the part of the dimension in
            (0, 1], rounded up.
        stride: Queries that share a window; 1 slides, the window itself gives blocks; "tile" takes the tile, at most
            the window, so that all queries of a whole tile see the same keys.
        dilation: Distance between keys; "widest" is the greatest that the window allows, `side // window`.
        causal: Whether queries see no later tokens along a dimension.
        tile: Tokens of a tile; by default the box of `block` tokens that is the cheapest, see `best_tile`.
        snap: Compute every block that holds a kept pair whole, without an element test.
        block: Tokens per query block and per key block.
        before: Text tokens before the grid.
        after: Text tokens behind it.
        device: Where the plan is built and kept.

    Returns:
        The plan, shared by all batch items and heads.

    Raises:
        ValueError: A setting is out of the range that the grid allows, or has the wrong number of dimensions.
    """
    if before < 0 or after < 0:
        raise ValueError(f"numbers of text tokens must not be negative, got {before} before and {after} after")
    shape = shape_for(grid, window=window, stride=stride, dilation=dilation, causal=causal, tile=tile, block=block)
    visual, length = math.prod(grid), math.prod(grid) + before + after
    tiled = neighborhood_order(shape, device)
    outside = torch.arange(visual, length, device=device)
    plain = shape.pair_test(raster=torch.cat([tiled, outside]))
    test = _TiledNeighborhood(plain.grid, plain.dilation, plain.ranges, plain.raster, shape)
    texts = [torch.arange(*part, device=device) for part in ((0, before), (before + visual, length))]
    order = torch.cat([tiled + before, *texts])
    in_place = torch.equal(order, torch.arange(length, device=device))
    if snap:
        full, partial = blocks_of(test, length, length, block, block)
        keep = full | partial
    else:
        keep = torch.ones(-(-length // block), -(-length // block), dtype=torch.bool, device=device)
    text = ((visual, length),) if length > visual else ()
    return plan_from_blocks(
        keep,
        q_len=length,
        kv_len=length,
        block_q=block,
        block_kv=block,
        pair_test=None if snap else test,
        order=None if in_place else order,
        always_q=text,
        always_kv=text,
        method="neighborhood",
        details=shape.details() | {"block": block, "snap": snap},
    )


def shape_for(
    grid: Grid,
    *,
    window: Window = USUAL_WINDOW,
    stride: Stride = 1,
    dilation: Dilation = 1,
    causal: bool | Sequence[bool] = False,
    tile: Whole | None = None,
    block: int = 128,
) -> NeighborhoodShape:
    """Finds the numbers for a grid; arguments and errors as in `neighborhood_plan`."""
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"a grid is (frames, height, width), each at least 1; got {grid}")
    check_settings(window=window, stride=stride, dilation=dilation, causal=causal, tile=tile, block=block)
    parts = _per_axis("window", window, grid, 1)
    steps = (1, 1, 1) if isinstance(dilation, str) else _whole(_per_axis("dilation", dilation, grid, 1))
    windows = _triple(_window_along(axis, grid[axis], parts[axis], steps[axis]) for axis in range(3))
    if isinstance(dilation, str):
        steps = _triple(length // w for length, w in zip(grid, windows, strict=True))
    causals = tuple(bool(c) for c in _per_axis("causal", causal, grid, False))
    given = None if isinstance(stride, str) else _whole(_per_axis("stride", stride, grid, 1))
    for axis, (w, s) in enumerate(zip(windows, given or windows, strict=True)):
        if s > w:
            raise ValueError(
                f"stride {s} is larger than the window along the {AXES[axis]}, which holds {w} of {grid[axis]}; give "
                f"a stride of 1 to {w}, or a larger window"
            )
    rest = (grid, windows, given, steps, (causals[0], causals[1], causals[2]))
    tiles = best_tile(*rest, block) if tile is None else _whole(_per_axis("tile", tile, grid, 1))
    return _with_tile(*rest, tiles)


def check_settings(
    *,
    window: Window,
    stride: Stride,
    dilation: Dilation,
    causal: bool | Sequence[bool],
    tile: Whole | None,
    block: int,
) -> None:
    """Checks what can be checked without a grid.

    Raises:
        ValueError: A number is out of range on any grid, or there are other than 1, 2 or 3 of them.
    """
    for name, value, words in (("stride", stride, ("tile",)), ("dilation", dilation, ("widest",))):
        if isinstance(value, str):
            if value not in words:
                raise ValueError(f"{name} is a number, or {words[0]!r}; got {value!r}")
        else:
            _check_each(name, value, _is_whole, "whole numbers from 1")
    _check_each("window", window, _is_part, "whole numbers of tokens from 1, or parts of the grid in (0, 1] as floats")
    _check_each("causal", causal, lambda c: isinstance(c, bool), "True or False")
    if tile is not None:
        _check_each("tile", tile, _is_whole, "whole numbers of tokens from 1")
    if not _is_whole(block):
        raise ValueError(f"block is a whole number of tokens from 1; got {block!r}")
    if not isinstance(stride, str):
        _check_stride(window, stride)


def best_tile(
    grid: Grid, window: Grid, stride: Grid | None, dilation: Grid, causal: tuple[bool, bool, bool], block: int
) -> Grid:
    """Finds the box of `block` tokens whose order computes the fewest blocks; the rounder one of equals.

    Boxes are ranked by the tiles that hold a kept pair, where tokens in tiles that the border cuts count twice, as
    their blocks hold parts of several tiles.  On small grids, where that matters, the first few and plain raster order
    are then compared by their blocks.

    Args:
        grid: Tokens of the grid; like the others from `shape_for`.
        window: Keys of a query.
        stride: Queries that share a window; None for the tile.
        dilation: Distance between keys.
        causal: Whether queries see no later keys.
        block: Tokens of the tile.

    Returns:
        Its sides.
    """
    sides = [[s for s in range(1, min(length, block) + 1) if block % s == 0] for length in grid]
    shares = [
        {
            s: _share_along(grid[a], window[a], min(s, window[a]) if stride is None else stride[a], dilation[a], c, s)
            for s in sides[a]
        }
        for a, c in enumerate(causal)
    ]

    def cost(tile: Grid) -> tuple[float, int]:
        along = [shares[axis][side] for axis, side in enumerate(tile)]
        computed = math.prod(share for share, _ in along)
        whole = math.prod(whole for _, whole in along)
        return round(computed * (2 - whole), 9), sum(tile)

    boxes = [_triple(box) for box in itertools.product(*sides) if math.prod(box) <= block]
    largest = max(map(math.prod, boxes))  # less than a block only if the grid is as small
    ranked = sorted((box for box in boxes if math.prod(box) == largest), key=cost)
    if math.prod(grid) > _COUNTED_TOKENS:
        return ranked[0]
    several = ranked[:_COUNTED_TILES] + ([] if stride is None else [grid])
    return min(
        several, key=lambda tile: _computed_pairs(_with_tile(grid, window, stride, dilation, causal, tile), block)
    )


def _with_tile(
    grid: Grid, window: Grid, stride: Grid | None, dilation: Grid, causal: tuple[bool, bool, bool], tile: Grid
) -> NeighborhoodShape:
    shared = _triple(map(min, tile, window)) if stride is None else stride
    return NeighborhoodShape(grid, window, shared, dilation, causal, tile)


def _computed_pairs(shape: NeighborhoodShape, block: int) -> int:
    """Pairs in blocks that hold a kept one."""
    tokens = math.prod(shape.grid)
    return int(
        block_area(tokens, tokens, block, block, torch.device("cpu"))[
            pairs_in_tile_order(shape, tokens, block) > 0
        ].sum()
    )


def _share_along(length: int, window: int, stride: int, dilation: int, causal: bool, side: int) -> tuple[float, float]:
    """Part of the pairs in tiles that hold a kept one, and part of the tokens in whole tiles, in one dimension."""
    index = torch.arange(length)
    test = Neighborhood.of((length,), window, stride=stride, dilation=dilation, causal=causal)
    rows, columns = test.keeps(index[:, None], index[None]).nonzero(as_tuple=True)
    tiles = AxisTiles.cut(length, side, dilation)
    count = int(tiles.number.max()) + 1
    touched = torch.zeros(count, count, dtype=torch.float64)
    touched[tiles.number[rows], tiles.number[columns]] = 1
    sizes = tiles.number.bincount(minlength=count).to(torch.float64)
    return float(sizes @ touched @ sizes) / length**2, 1 - float(tiles.short.double().mean())


def _window_along(axis: int, length: int, part: int | float, dilation: int) -> int:
    """Keys of a query in one dimension."""
    name, most = AXES[axis], length // dilation
    if dilation > length:
        raise ValueError(f"dilation {dilation} is larger than the {length} {name} of the grid; give 1 to {length}")
    if isinstance(part, float):
        return max(1, math.ceil(part * most - 1e-9))
    if part > length:
        raise ValueError(
            f"window {part} is larger than the {length} {name} of the grid; give 1 to {most}, or a part of the grid "
            "in (0, 1] such as 0.5, which fits any"
        )
    if part > most:
        raise ValueError(
            f"window {part} with dilation {dilation} reaches over {part * dilation} of {length} {name}; give a window "
            f"of 1 to {most}, or a dilation of 1 to {length // part}"
        )
    return part


def _per_axis(name: str, value: Any, grid: Grid, neutral: Any) -> tuple[Any, Any, Any]:
    """One entry for each of (frames, rows, columns); a lone frame has the neutral one if nothing is said of it."""
    if not isinstance(value, Sequence):
        return (neutral if grid[0] == 1 else value, value, value)
    if len(value) == 3:
        return (value[0], value[1], value[2])
    if grid[0] > 1:
        raise ValueError(
            f"{name} has {len(value)} entries for a grid of {grid[0]} frames; give one number, or three: "
            "frames, rows, columns"
        )
    return (neutral, value[0], value[1])


def _check_each(name: str, value: Any, fits: Any, valid: str) -> None:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    entries = value if several else (value,)
    if several and len(entries) not in (2, 3):
        raise ValueError(
            f"{name} has {len(entries)} entries; give one number, two for images (rows, columns), or three for videos "
            "(frames, rows, columns)"
        )
    if not all(fits(entry) for entry in entries):
        raise ValueError(f"{name} takes {valid}; got {value!r}")


def _check_stride(window: Window, stride: Whole) -> None:
    """Compares what is counted in tokens on both sides."""
    windows = list(window) if isinstance(window, Sequence) else [window]
    strides = list(stride) if isinstance(stride, Sequence) else [stride]
    dims = max(len(windows), len(strides))
    if {len(windows), len(strides)} - {1, dims}:
        return  # one of them does not fit the grid
    for w, s in zip(windows * dims, strides * dims, strict=False):
        if isinstance(w, int) and s > w:
            raise ValueError(f"stride {s} is larger than the window, {w}; give a stride of 1 to {w}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_part(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and 0 < value <= 1)


def _triple(values: Any) -> Grid:
    frames, rows, columns = values
    return (frames, rows, columns)


def _whole(values: tuple[Any, Any, Any]) -> Grid:
    return (int(values[0]), int(values[1]), int(values[2]))
