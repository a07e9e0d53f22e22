"""Neighborhood plans against the formula, key by key, and the published figures of its paper (arXiv 2504.16922)."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.pair_tests import Neighborhood
from dit_accel.kernels.token_order import tile_order
from dit_accel.plan import pipeline_speedup
from dit_accel.plan.neighborhood import neighborhood_plan, shape_for
from dit_accel.plan.simulate import computed_share
from dit_accel.plan.tile_cost import TILINGS, flop_bound, simulation, tile_cost
from dit_accel.plan.tiles import NeighborhoodShape, neighborhood_order, pairs_in_tile_order

HUNYUAN, COSMOS, FLUX = (30, 48, 80), (16, 44, 80), (1, 256, 256)


def keeps(i: int, j: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """Whether query i keeps key j of one dimension, word by word."""
    if i % dilation != j % dilation:
        return False
    own, other = i // dilation, j // dilation
    size = length // dilation + (1 if i % dilation < length % dilation else 0)
    if causal:
        leader = min(own // stride * stride + stride - 1, size - 1)
        return other <= own and leader - other < window
    leader = min(own // stride * stride + stride // 2, size - 1)
    start = min(max(leader - window // 2, 0), size - window)
    return start <= other < start + window


def along(*numbers: Any) -> Tensor:
    """Mask of one dimension; the first number is its length."""
    return torch.tensor([[keeps(i, j, *numbers) for j in range(numbers[0])] for i in range(numbers[0])])


def oracle(shape: NeighborhoodShape, before: int = 0, after: int = 0) -> Tensor:
    """Bool `[N, N]` in the order of the sequence: text, raster grid, text."""
    mask = torch.ones(1, 1, dtype=torch.int8)
    for numbers in zip(shape.grid, shape.window, shape.stride, shape.dilation, shape.causal, strict=True):
        mask = torch.kron(mask, along(*numbers).to(torch.int8))
    return torch.nn.functional.pad(mask.bool(), (before, after, before, after), value=True)


def random_settings(seed: int) -> dict[str, Any]:
    """An odd little grid of a video or an image, and settings that fit it, counted or as parts."""
    rng = random.Random(seed)
    image = seed % 4 == 0
    grid = (1, rng.randint(2, 19), rng.randint(2, 19)) if image else tuple(rng.randint(2, 9) for _ in range(3))
    dims = grid[1:] if image else grid
    dilation = tuple(rng.choice([1, rng.randint(1, min(3, n))]) for n in dims)
    window = tuple(rng.randint(1, n // d) for n, d in zip(dims, dilation, strict=True))
    settings: dict[str, Any] = {
        "window": window,
        "stride": tuple(rng.choice([1, rng.randint(1, w), w]) for w in window),
        "dilation": dilation,
        "causal": tuple(rng.random() < 0.25 for _ in dims),
        "tile": rng.choice([None, tuple(rng.randint(1, 5) for _ in dims), 3]),
        "block": rng.choice([16, 27, 64]),
    }
    if seed % 3 == 0:
        settings |= {"window": round(rng.uniform(0.1, 1), 2), "stride": rng.choice([1, "tile"])}
    if seed % 5 == 0:
        settings |= {"dilation": "widest"}
        settings |= {"window": 0.4} if isinstance(settings["window"], float) else {}
    return {"grid": grid, **settings}


@pytest.mark.parametrize("seed", range(60))
def test_plan_is_the_formula(seed: int) -> None:
    settings, before, after = random_settings(seed), seed % 3 * 5, (0, 40, 7, 0)[seed % 4]
    shape = shape_for(**settings)
    wanted = oracle(shape, before, after)
    plan = neighborhood_plan(**settings, before=before, after=after)
    assert torch.equal(plan.element_mask()[0, 0], wanted)
    assert plan.density == pytest.approx(wanted.double().mean().item(), abs=1e-12)
    visual = slice(before, len(wanted) - after)
    if not any(shape.causal):
        assert wanted[visual, visual].sum(1).eq(math.prod(shape.window)).all()


@pytest.mark.parametrize("seed", range(50))
def test_pairs_of_blocks_are_counted_exactly(seed: int) -> None:
    """The count by boxes against the count pair by pair, tiles that straddle blocks included."""
    settings = random_settings(seed)
    block, shape = settings["block"], shape_for(**settings)
    length = math.prod(shape.grid) + (0, 1, 33)[seed % 3]
    raster = torch.cat([neighborhood_order(shape), torch.arange(math.prod(shape.grid), length)])
    mask = oracle(shape, after=length - math.prod(shape.grid))[raster][:, raster]
    counts = [[int(part.sum()) for part in rows.split(block, 1)] for rows in mask.split(block)]
    assert pairs_in_tile_order(shape, length, block).tolist() == counts
    plain = shape.pair_test(raster=raster)
    assert Neighborhood.pairs_per_block(plain, length, length, block, block).tolist() == counts


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_snapping_keeps_whole_blocks_that_hold_a_kept_pair(seed: int) -> None:
    settings = random_settings(seed)
    block, plan = settings["block"], neighborhood_plan(**settings, before=3, after=4, snap=True)
    exact = neighborhood_plan(**settings, before=3, after=4)
    order = torch.arange(plan.q_len) if plan.order is None else plan.order
    mask = oracle(shape_for(**settings), 3, 4)[order][:, order]
    wanted = [[bool(part.any()) for part in rows.split(block, 1)] for rows in mask.split(block)]
    assert plan.pair_test is None and plan.to_bool()[0, 0].tolist() == wanted
    assert plan.density == pytest.approx(computed_share(exact)) and plan.density >= exact.density


@pytest.mark.parametrize(
    ("grid", "window", "stride", "sparsity"),
    [
        (HUNYUAN, (18, 24, 24), (16, 8, 8), 0.91),
        (HUNYUAN, (30, 40, 40), (1, 32, 8), 0.58),
        (COSMOS, (16, 32, 48), (1, 8, 16), 0.56),
        (FLUX, (80, 80), (16, 16), 0.90),
    ],
)
def test_published_windows_have_the_published_sparsity(grid: Any, window: Any, stride: Any, sparsity: float) -> None:
    shape = shape_for(grid, window=window, stride=stride, tile=(1, 8, 16))
    assert 1 - 1 / flop_bound(shape) == pytest.approx(sparsity, abs=5e-3)


@pytest.mark.parametrize(
    ("attention", "dense_steps", "grid", "window", "published"),
    [
        (0.607, 15 / 50, HUNYUAN, (18, 24, 24), (1.63, 1.63)),  # published bound and measured speed-up
        (0.607, 0, HUNYUAN, (18, 24, 24), (2.23, 2.27)),
        (0.587, 12 / 35, COSMOS, (16, 32, 48), (1.28, 1.26)),
        (0.518, 9 / 28, FLUX, (80, 80), (1.46, 1.45)),
    ],
)
def test_bounds_agree_with_published_speedups(
    attention: float, dense_steps: float, grid: Any, window: Any, published: tuple[float, float]
) -> None:
    shape = shape_for(grid, window=window, tile=(1, 8, 16))
    bound = pipeline_speedup(attention, dense_steps, 1 / flop_bound(shape), kernel_efficiency=1.0)
    assert bound == pytest.approx(published[0], abs=6e-3)
    assert bound == pytest.approx(published[1], rel=0.02)


def test_published_hunyuan_setting_never_cuts_a_block() -> None:
    plan = neighborhood_plan(HUNYUAN, window=(18, 24, 24), stride=(16, 8, 8))
    assert torch.equal(plan.counts, plan.full_counts)
    assert plan.stats.details["tile"] == (2, 8, 8)
    assert computed_share(plan) == pytest.approx(plan.density) == pytest.approx(0.09)
    shape = shape_for(HUNYUAN, window=(18, 24, 24), stride=(16, 8, 8))
    for tiling in TILINGS:
        cost = tile_cost(shape, (4, 8, 8), (2, 8, 8), tiling)
        assert cost.block_sparse and cost.total == 900
        assert cost.most == 81 and cost.speedup == pytest.approx(flop_bound(shape))


def test_sliding_tile_attention_is_a_special_case() -> None:
    """Tiles that divide the grid, a window of odd tiles: whole tiles around the own one, moved inward at borders."""
    grid, tile, tiles = (6, 12, 20), (2, 4, 4), (3, 3, 5)
    window = tuple(a * b for a, b in zip(tile, (3, 1, 3), strict=True))
    plan = neighborhood_plan(grid, window=window, stride=tile, tile=tile, block=32)
    coordinates = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(-1, 3)
    own = coordinates // torch.tensor(tile)
    half = torch.tensor((1, 0, 1))
    centre = torch.minimum(torch.maximum(own, half), torch.tensor(tiles) - 1 - half)
    wanted = ((own[None] - centre[:, None]).abs() <= half).all(-1)
    assert torch.equal(plan.element_mask()[0, 0], wanted)
    assert plan.density == pytest.approx(wanted.double().mean().item()) == computed_share(plan)


def test_order_puts_whole_tiles_first() -> None:
    shape = shape_for((4, 8, 6), tile=(2, 4, 3), window=0.5)
    assert torch.equal(neighborhood_order(shape), tile_order((4, 8, 6), (2, 4, 3)))
    shape = shape_for((5, 9, 7), tile=(2, 4, 2), window=0.5)
    order = neighborhood_order(shape)
    assert order.sort().values.tolist() == list(range(5 * 9 * 7))
    tiles = torch.stack([order // 63 // 2, order // 7 % 9 // 4, order % 7 // 2], -1)[: 2 * 2 * 3 * 16].view(12, 16, 3)
    assert (tiles == tiles[:, :1]).all()
    assert tiles[:, 0].tolist() == [list(t) for t in itertools.product(range(2), range(2), range(3))]


def test_dilated_tokens_share_tiles_with_those_they_see() -> None:
    """In raster order every block would hold some pair; in groups of a dilation half of all blocks have none."""
    plan = neighborhood_plan((1, 16, 16), window=8, dilation=2, block=64)
    assert computed_share(plan) == pytest.approx(plan.density) == pytest.approx(0.25)


@pytest.mark.parametrize(("grid", "block"), [((7, 15, 13), 64), ((9, 16, 16), 128), ((1, 45, 37), 64)])
def test_chosen_tile_is_nearly_the_cheapest(grid: Any, block: int) -> None:
    divisors = [side for side in range(1, block + 1) if block % side == 0]
    tiles = [(a, b, block // a // b) for a, b in itertools.product(divisors, divisors) if block % (a * b) == 0]
    fits = [tile for tile in tiles if all(side <= length for side, length in zip(tile, grid, strict=True))]
    cheapest = min(computed_share(neighborhood_plan(grid, tile=tile, block=block)) for tile in fits)
    raster = computed_share(neighborhood_plan(grid, tile=grid, block=block))
    chosen = computed_share(neighborhood_plan(grid, block=block))
    assert chosen <= min(1.02 * cheapest, raster)


@pytest.mark.parametrize("text", [(0, 0), (0, 50), (50, 0)])
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 7), (2, 1, 3), (3, 4, 5), (13, 1, 1)])
def test_default_window_fits_any_grid(grid: Any, text: tuple[int, int]) -> None:
    plan = neighborhood_plan(grid, before=text[0], after=text[1])
    kept = math.prod(1 if frames == 1 == grid[i] else math.ceil(0.6 * frames) for i, frames in enumerate(grid))
    video, length = math.prod(grid), plan.q_len
    assert plan.density * length**2 == pytest.approx(length**2 - video**2 + video * kept)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("seed", range(60))
def test_simulator_counts_the_tiles_that_are_visited(seed: int, tiling: str) -> None:
    rng = random.Random(seed)
    shape = shape_for(**random_settings(seed))
    q_tile, kv_tile = ((rng.randint(1, 5), rng.randint(1, 5), rng.randint(1, 5)) for _ in range(2))
    cost = tile_cost(shape, q_tile, kv_tile, tiling)
    visits, whole = brute_visits(shape, q_tile, kv_tile, tiling)
    assert cost.most == max(visits) and cost.mean == pytest.approx(sum(visits) / len(visits))
    assert cost.block_sparse == whole
    dense = math.prod(math.ceil(n / q) * math.ceil(n / k) for n, q, k in zip(shape.grid, q_tile, kv_tile, strict=True))
    assert cost.speedup == pytest.approx(dense / sum(visits))
    assert cost.worst_speedup == pytest.approx(
        math.prod(math.ceil(n / k) for n, k in zip(shape.grid, kv_tile, strict=True)) / max(visits)
    )


def brute_visits(shape: NeighborhoodShape, q_tile: Any, kv_tile: Any, tiling: str) -> tuple[list[int], bool]:
    """Walks over the tiles of every dilation group as a kernel does, and looks at the mask of what it visits."""
    masks = [along(*n) for n in zip(shape.grid, shape.window, shape.stride, shape.dilation, shape.causal, strict=True)]
    visits, whole = [], True
    for group in itertools.product(*map(range, shape.dilation)):
        parts = [mask[g::d, g::d] for mask, g, d in zip(masks, group, shape.dilation, strict=True)]
        starts = [range(0, len(part), side) for part, side in zip(parts, q_tile, strict=True)]
        for corner in itertools.product(*starts):
            count = 1
            for part, start, q_side, kv_side in zip(parts, corner, q_tile, kv_tile, strict=True):
                rows = part[start : start + q_side]
                seen = rows.any(0).nonzero()[:, 0].tolist()
                first = seen[0] if tiling == "dynamic" else 0
                edges = [e for e in range(first, len(part), kv_side) if rows[:, e : e + kv_side].any()]
                count *= len(edges)
                whole = whole and all(bool(rows[:, e : e + kv_side].all()) for e in edges)
            visits.append(count)
    return visits, whole


@pytest.mark.parametrize("seed", range(20))
def test_tiles_that_divide_window_and_stride_are_block_sparse(seed: int) -> None:
    rng = random.Random(seed)
    tile = tuple(rng.randint(1, 3) for _ in range(3))
    window = tuple(side * rng.randint(1, 3) for side in tile)
    grid = tuple(w + rng.randint(0, 6) for w in window)
    stride = tuple(rng.choice(range(side, w + 1, side)) for side, w in zip(tile, window, strict=True))
    shape = shape_for((grid[0], grid[1], grid[2]), window=window, stride=stride, tile=tile)
    cost = tile_cost(shape, shape.tile, shape.tile, "dynamic")
    assert cost.block_sparse
    if all(n % side == 0 for n, side in zip(grid, tile, strict=True)):
        assert cost.speedup == pytest.approx(flop_bound(shape))


def test_simulation_is_plain() -> None:
    found = simulation(shape_for((4, 8, 8), window=(2, 4, 4), stride=(2, 4, 4), tile=(2, 4, 4)))
    assert found["flop_bound"] == 8 == found["static_tiling"]["speedup"] == found["dynamic_tiling"]["worst_speedup"]
    assert found["static_tiling"]["block_sparse"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (3, 9, 3)}, r"window 9 is larger than the 8 rows of the grid; give 1 to 8"),
        ({"window": 11}, r"larger than the 5 frames of the grid; give 1 to 5, or a part"),
        ({"window": 5, "stride": 6}, "stride 6 is larger than the window, 5; give a stride of 1 to 5"),
        ({"window": (5, 5, 3), "stride": (1, 1, 4)}, "stride 4 is larger than the window, 3"),
        ({"window": 0.5, "stride": 4}, "along the frames, which holds 3 of 5; give a stride of 1 to 3"),
        (
            {"window": (1, 3, 3), "dilation": (1, 3, 1)},
            "reaches over 9 of 8 rows; give a window of 1 to 2, or a dilat",
        ),
        ({"dilation": 9}, "dilation 9 is larger than the 5 frames"),
        ({"window": (3, 3)}, "window has 2 entries for a grid of 5 frames"),
        ({"window": (3, 3, 3, 3)}, "window has 4 entries; give one number, two for images"),
        ({"stride": (1,)}, "stride has 1 entries"),
        ({"window": 0}, r"in \(0, 1\] as floats; got 0"),
        ({"window": 1.5}, r"got 1\.5"),
        ({"window": True}, "got True"),
        ({"window": "wide"}, "got 'wide'"),
        ({"stride": 0}, "whole numbers from 1; got 0"),
        ({"stride": "tiles"}, "'tile'; got 'tiles'"),
        ({"dilation": 1.5}, "whole numbers from 1"),
        ({"causal": 1}, "True or False"),
        ({"tile": (0, 1, 1)}, "tile takes whole numbers"),
        ({"tile": (4, 4)}, "tile has 2 entries for a grid of 5 frames"),
        ({"block": 0}, "block is"),
        ({"before": -1}, "negative"),
        ({"grid": (5, 8)}, "frames, height, width"),
    ],
)
def test_bad_settings_say_what_fits(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_plan(**{"grid": (5, 8, 11), **settings})


def test_simulator_refuses_what_it_does_not_know() -> None:
    shape = shape_for((5, 8, 11))
    with pytest.raises(ValueError, match="'static' or 'dynamic'; got 'best'"):
        tile_cost(shape, (1, 1, 1), (1, 1, 1), "best")
    with pytest.raises(ValueError, match="each at least 1"):
        tile_cost(shape, (1, 1, 1), (1, 0, 1))
