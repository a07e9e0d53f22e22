"""What neighborhood attention should save, by counting tiles: the simulator that its paper describes.

A kernel takes a tile of queries and walks over tiles of keys.  With static tiling those are cut once, from the start
of the grid; with dynamic tiling from the first key that the tile of queries sees.  The fewer tiles, the faster; both
bounds assume that every tile takes equally long.

Source: Hassani et al., "Generalized Neighborhood Attention", arXiv 2504.16922 (NATTENSim, which was not released).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .tiles import Grid, NeighborhoodShape

TILINGS = ("static", "dynamic")

Range = tuple[int, int]


@dataclass(frozen=True)
class TileCost:
    """Tiles that a kernel visits.

    Attributes:
        total: Tiles of keys that a tile of queries visits in dense attention.
        mean: Tiles of keys that a tile of queries visits on average.
        most: Tiles of keys that the busiest tile of queries visits.
        speedup: Tiles of dense attention over tiles visited, in all; infinitely many workers never wait.
        worst_speedup: The same if all take as long as the busiest.
        block_sparse: Whether every visited pair of tiles is kept whole, so that no element is ever tested.
    """

    total: int
    mean: float
    most: int
    speedup: float
    worst_speedup: float
    block_sparse: bool


def tile_cost(shape: NeighborhoodShape, q_tile: Grid, kv_tile: Grid, tiling: str = "static") -> TileCost:
    """Counts the tiles that neighborhood attention visits on its grid, text left aside.

    Along a dimension a tile of queries sees the keys from the first one of its first query to the last one of its last
    query, within its dilation group; visited tiles are the product over dimensions.

    Args:
        shape: The neighborhood; its own tile is not looked at.
        q_tile: Queries of a tile, as (frames, rows, columns).
        kv_tile: Keys of a tile.
        tiling: "static" or "dynamic".

    Returns:
        The counts and the bounds.

    Raises:
        ValueError: Another tiling, or sides below 1.
    """
    if tiling not in TILINGS:
        raise ValueError(f"tiling is {' or '.join(map(repr, TILINGS))}; got {tiling!r}")
    if len(q_tile) != 3 or len(kv_tile) != 3 or min(*q_tile, *kv_tile) < 1:
        raise ValueError(f"tiles are (frames, rows, columns), each at least 1; got {q_tile} and {kv_tile}")
    visits, dense, whole = [], 1, True
    for axis in range(3):
        along, exact = _visits_along(shape, axis, q_tile[axis], kv_tile[axis], tiling)
        visits.append(along)
        dense *= -(-shape.grid[axis] // q_tile[axis])
        whole &= exact
    total = math.prod(-(-length // side) for length, side in zip(shape.grid, kv_tile, strict=True))
    most, visited = math.prod(map(max, visits)), math.prod(map(sum, visits))
    mean = visited / math.prod(map(len, visits))
    return TileCost(total, mean, most, dense * total / visited, total / most, whole)


def flop_bound(shape: NeighborhoodShape) -> float:
    """All pairs over kept pairs: `tokens / prod(window)` where nothing is causal."""
    bound = 1.0
    for axis, length in enumerate(shape.grid):
        step = shape.dilation[axis]
        bound *= length**2 / sum((last - first) // step + 1 for first, last in _ranges(shape, axis))
    return bound


def simulation(shape: NeighborhoodShape) -> dict[str, Any]:
    """Bounds by arithmetic and by tiles of the shape's own size, both tilings, as plain values."""
    costs = {name: asdict(tile_cost(shape, shape.tile, shape.tile, name)) for name in TILINGS}
    return {"flop_bound": flop_bound(shape), **{f"{name}_tiling": cost for name, cost in costs.items()}}


def _visits_along(
    shape: NeighborhoodShape, axis: int, q_side: int, kv_side: int, tiling: str
) -> tuple[list[int], bool]:
    """Tiles of keys visited by each tile of queries in one dimension, and whether none of them is cut."""
    step = shape.dilation[axis]
    visits, whole = [], True
    for group in range(step):
        ranges = [(first // step, last // step) for first, last in _ranges(shape, axis)[group::step]]
        for start in range(0, len(ranges), q_side):
            tile = ranges[start : start + q_side]
            first, last = tile[0][0], tile[-1][1]
            origin = first if tiling == "dynamic" else 0
            visits.append((last - origin) // kv_side - (first - origin) // kv_side + 1)
            whole &= _is_whole(tile, origin, kv_side, len(ranges))
    return visits, whole


def _is_whole(tile: Sequence[Range], origin: int, kv_side: int, size: int) -> bool:
    """Whether all queries of a tile see the same keys, and those fill tiles; the border may cut the last one."""
    first, last = tile[0]
    ends = (last + 1 - origin) % kv_side == 0 or last + 1 == size
    return len(set(tile)) == 1 and (first - origin) % kv_side == 0 and ends


def _ranges(shape: NeighborhoodShape, axis: int) -> list[Range]:
    """First and last kept coordinate of every query coordinate of one dimension."""
    rows: list[list[int]] = shape.along(axis).ranges[-shape.grid[axis] :].tolist()
    return [(first, last) for first, last in rows]
