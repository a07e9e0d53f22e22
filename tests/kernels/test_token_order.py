"""Token orders are permutations that keep tiles together; plans move between orders and keep the same pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks
from dit_accel.kernels.token_order import (
    Grid,
    check_order,
    inverse_order,
    morton_order,
    pixel_order,
    plan_in_order,
    raster_order,
    tile_order,
    with_text,
)

GRIDS: list[Grid] = [(1, 1, 1), (3, 5, 7), (4, 4, 4), (1, 6, 9), (5, 1, 3), (2, 8, 3)]
TILES: list[Grid] = [(1, 1, 1), (2, 2, 2), (2, 3, 4), (3, 2, 5), (9, 9, 9)]
ORDERS: dict[str, Callable[[Grid], Tensor]] = {
    "raster": raster_order,
    "tile": lambda grid: tile_order(grid, (2, 3, 2)),
    "pixel": pixel_order,
    "morton": morton_order,
}


def places(grid: Grid) -> list[Grid]:
    """Coordinates of the raster tokens."""
    return [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_order_is_a_permutation_with_an_inverse(name: str, grid: Grid) -> None:
    order = ORDERS[name](grid)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(math.prod(grid)))
    check_order(order, math.prod(grid))
    position = inverse_order(order)
    assert torch.equal(position[order], torch.arange(len(order))) and torch.equal(order[position], position[order])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tile", TILES)
def test_tiles_are_runs_in_raster_order(grid: Grid, tile: Grid) -> None:
    coordinates = places(grid)
    in_order = [coordinates[token] for token in tile_order(grid, tile).tolist()]
    tiles = [tuple(x // side for x, side in zip(place, tile, strict=True)) for place in in_order]
    runs = [which for i, which in enumerate(tiles) if i == 0 or tiles[i - 1] != which]
    assert len(runs) == math.prod(-(-n // side) for n, side in zip(grid, tile, strict=True))
    assert runs == sorted(set(runs))  # each tile once, in raster order of tiles
    assert in_order == sorted(
        in_order, key=lambda place: [x // s for x, s in zip(place, tile, strict=True)] + [*place]
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_tiles_of_one_frame_or_one_token_are_the_raster_order(grid: Grid) -> None:
    for tile in ((1, 1, 1), (1, grid[1], grid[2]), grid):
        assert torch.equal(tile_order(grid, tile), raster_order(grid))


@pytest.mark.parametrize("grid", GRIDS)
def test_pixel_order_and_back(grid: Grid) -> None:
    coordinates = places(grid)
    in_order = [coordinates[token] for token in pixel_order(grid).tolist()]
    assert in_order == sorted(coordinates, key=lambda place: (place[1], place[2], place[0]))
    frames, pixels = grid[0], grid[1] * grid[2]
    assert torch.equal(inverse_order(pixel_order(grid)), pixel_order((pixels, frames, 1)))


def interleaved(place: Grid) -> int:
    """Bits of (frame, row, column), written one after the other into a string of digits."""
    digits = [f"{x:012b}" for x in place]
    return int("".join(t + h + w for t, h, w in zip(*digits, strict=True)), 2)


@pytest.mark.parametrize("grid", [*GRIDS, (9, 2, 33)])
def test_morton_is_sorting_by_interleaved_bits(grid: Grid) -> None:
    coordinates = places(grid)
    in_order = [coordinates[token] for token in morton_order(grid).tolist()]
    assert in_order == sorted(coordinates, key=interleaved)


def test_morton_by_hand() -> None:
    assert morton_order((2, 2, 3)).tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 2, 5, 8, 11]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (0, 2), (4, 5)])
def test_text_stays_in_place(before: int, after: int) -> None:
    order = with_text(morton_order((2, 3, 2)), before=before, after=after)
    check_order(order, before + 12 + after)
    assert order[:before].tolist() == list(range(before))
    assert torch.equal(order[before : before + 12] - before, morton_order((2, 3, 2)))
    assert order[before + 12 :].tolist() == list(range(before + 12, before + 12 + after))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(5), r"shape \(6,\)"),
        (torch.arange(6, dtype=torch.int32), "int64"),
        (torch.tensor([0, 1, 2, 3, 4, 4]), "once"),
        (torch.tensor([1, 2, 3, 4, 5, 6]), "once"),
    ],
)
def test_what_is_no_order(order: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_order(order, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: raster_order((0, 2, 2)), "grid is"),
        (lambda: tile_order((2, 2, 2), (1, 0, 1)), "tile is"),
        (lambda: morton_order((1, 1, (1 << 21) + 1)), "at most 2097152"),
        (lambda: with_text(raster_order((1, 1, 2)), before=-1), "negative"),
    ],
)
def test_bad_sizes(make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


GRID: Grid = (3, 5, 7)
TOKENS = math.prod(GRID)


def make_plan(order: Tensor | None, banded: bool) -> SparsePlan:
    keep = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    band = Band(35, torch.tensor([30, 9, -1], dtype=torch.int32), TOKENS, 3) if banded else None
    return plan_from_blocks(keep, q_len=TOKENS, kv_len=TOKENS, block_q=32, block_kv=32, pair_test=band, order=order)


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("stack", ["morton", "tile"])
@pytest.mark.parametrize("planned", [None, "morton", "tile", "raster"])
def test_a_plan_in_the_order_of_the_stack_keeps_the_same_pairs(planned: str | None, stack: str, banded: bool) -> None:
    order = ORDERS[stack](GRID)
    plan = make_plan(ORDERS[planned](GRID) if planned else None, banded)
    moved = plan_in_order(plan, order)
    assert torch.equal(moved.element_mask(), plan.element_mask()[..., order, :][..., order])
    assert (moved.order is None) == (planned == stack)
    assert moved.stats is plan.stats and moved.indices is plan.indices


@pytest.mark.parametrize("planned", [None, "morton"])
def test_attention_inside_a_permuted_stack(planned: str | None) -> None:
    order = morton_order(GRID)
    plan = make_plan(order if planned else None, False)
    q, k, v = torch.randn(3, 2, 2, TOKENS, 16, generator=torch.Generator().manual_seed(0)).unbind()
    inside = attend(q[:, :, order], k[:, :, order], v[:, :, order], plan_in_order(plan, order))
    torch.testing.assert_close(inside[:, :, inverse_order(order)], attend(q, k, v, plan), rtol=1e-5, atol=1e-5)


def test_a_plan_that_was_moved_under_inference_mode_serves_training() -> None:
    plan, order = make_plan(None, False), morton_order(GRID)
    of_keys = replace(plan, kv_order=pixel_order(GRID))
    with torch.inference_mode():
        moved = [plan_in_order(each, order) for each in (plan, of_keys)]
    for each in moved:
        x = torch.randn(3, 2, 2, TOKENS, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        q, k, v = x.unbind()
        attend(q, k, v, each).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


def test_a_plan_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="105 queries and 105 keys, but the order permutes 12"):
        plan_in_order(make_plan(None, False), raster_order((1, 3, 4)))
