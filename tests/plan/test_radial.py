"""Radial plans against oracles that lay out every pair of tokens and follow the formulas word by word."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.plan import radial_plan

GRIDS = [(7, 15, 13), (5, 6, 10), (3, 4, 5), (20, 1, 3)]
CASES = [(grid, text, block) for grid in GRIDS for text in (0, 7, 33) for block in (16, 32, 64)]
cases = pytest.mark.parametrize(("grid", "text", "block"), CASES)
sinks = pytest.mark.parametrize("sink", [True, False])


def _paper_pair(d: int, s: int, offset: Tensor) -> Tensor:
    r = math.floor(math.log2(max(d, 1)))
    near = (offset + 1 <= s / 2**r) & (2**r <= s)
    return near | ((offset == 0) & (d % math.ceil(2**r / s) == 0))


def _authors_pair(d: int, s: int, offset: Tensor, block: int, decay: float) -> Tensor:
    power = 1
    while power <= s:
        power *= 2
    decay_length = power / 2 ** (len(f"{d:b}") if d else 0)
    if decay_length < 128 and d % math.floor(128 / decay_length) != 0:
        return torch.zeros_like(offset, dtype=torch.bool)
    width = s if d <= 1 else max(block, decay * decay_length)
    return offset <= width


def oracle(grid: tuple[int, int, int], text: int, sink: bool, rule: str, block: int, decay: float = 0.2) -> Tensor:
    """Bool [N, N], frame pair by frame pair."""
    frames, s = grid[0], grid[1] * grid[2]
    mask = torch.ones(frames * s + text, frames * s + text, dtype=torch.bool)
    offset = (torch.arange(s)[:, None] - torch.arange(s)).abs()
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            pair = _paper_pair(d, s, offset) if rule == "paper" else _authors_pair(d, s, offset, block, decay)
            mask[i * s : (i + 1) * s, j * s : (j + 1) * s] = pair | (sink and j == 0)
    return mask


def _tiles(mask: Tensor, block: int) -> list[list[Tensor]]:
    return [list(rows.split(block, 1)) for rows in mask.split(block)]


def _authors_tile(tile: Tensor) -> bool:
    density = tile.double().mean(0)
    return bool((density > 1 / 3).sum() / (density > 0).sum().clamp(min=1) > 0.6)


@cases
@sinks
@pytest.mark.parametrize("rule", ["authors", "paper"])
def test_element_mask_is_the_formula(grid: Any, text: int, block: int, sink: bool, rule: str) -> None:
    plan = radial_plan(grid, block=block, rule=rule, sink=sink, text_tokens=text, mask="element")
    expected = oracle(grid, text, sink, rule, block)
    assert torch.equal(plan.element_mask()[0, 0], expected)
    assert plan.density == pytest.approx(expected.double().mean().item(), abs=1e-12)
    full = plan.to_bool(full_only=True)[0, 0]
    touched = plan.to_bool()[0, 0]
    for r, row in enumerate(_tiles(expected, block)):
        for c, tile in enumerate(row):
            assert (bool(full[r, c]), bool(touched[r, c])) == (bool(tile.all()), bool(tile.any()))


@cases
@sinks
def test_paper_blocks_are_the_touched_ones(grid: Any, text: int, block: int, sink: bool) -> None:
    plan = radial_plan(grid, block=block, rule="paper", sink=sink, text_tokens=text)
    tiles = _tiles(oracle(grid, text, sink, "paper", block), block)
    assert torch.equal(plan.to_bool()[0, 0], torch.tensor([[bool(t.any()) for t in row] for row in tiles]))


@cases
@sinks
def test_authors_blocks_follow_their_column_rule(grid: Any, text: int, block: int, sink: bool) -> None:
    plan = radial_plan(grid, block=block, sink=sink, text_tokens=text)
    tiles = _tiles(oracle(grid, text, sink, "authors", block), block)
    expected = torch.tensor([[_authors_tile(t) for t in row] for row in tiles])
    video, s = grid[0] * grid[1] * grid[2], grid[1] * grid[2]
    if text:
        expected[video // block :] = True
        expected[:, video // block :] = True
    if sink:
        expected[:, : math.ceil(s / block)] = True
    assert torch.equal(plan.to_bool()[0, 0], expected)
    mask = plan.element_mask()[0, 0]
    assert plan.density == pytest.approx(mask.double().mean().item(), abs=1e-12)
    assert all(mask[:, a:b].all() for a, b in plan.always_kv)
    assert all(mask[a:b].all() for a, b in plan.always_q)


@pytest.mark.parametrize(
    ("grid", "block"), [((9, 16, 16), 32), ((9, 16, 16), 128), ((5, 8, 12), 32), ((5, 8, 12), 96)]
)
def test_aligned_frames_give_the_union_over_frame_pairs(grid: tuple[int, int, int], block: int) -> None:
    """On frames of whole blocks our rule is the authors', which they apply to each pair of frames and unite."""
    frames, s = grid[0], grid[1] * grid[2]
    per_frame = s // block
    mask = oracle(grid, 0, True, "authors", block)
    union = torch.zeros(frames * per_frame, frames * per_frame, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            pair = mask[i * s : (i + 1) * s, j * s : (j + 1) * s]
            kept = torch.tensor([[_authors_tile(t) for t in row] for row in _tiles(pair, block)])
            union[i * per_frame : (i + 1) * per_frame, j * per_frame : (j + 1) * per_frame] |= kept
    assert torch.equal(radial_plan(grid, block=block).to_bool()[0, 0], union)


@pytest.mark.parametrize(
    ("grid", "options", "density"),
    [
        ((18, 48, 80), {}, 0.2871),
        ((30, 48, 80), {"text_tokens": 256, "decay": 0.95, "sink": False}, 0.2778),
        ((9, 16, 16), {}, 0.8765),
        ((33, 16, 16), {}, 0.4582),
        ((9, 16, 16), {"block": 64}, 0.6960),
        ((33, 16, 16), {"block": 64}, 0.3305),
    ],
)
def test_density_is_that_of_the_published_code(grid: Any, options: dict[str, Any], density: float) -> None:
    """Whole blocks and no short tail here, so the share of blocks and the share of pairs are the same number."""
    plan = radial_plan(grid, **options)
    assert plan.density == pytest.approx(density, abs=6e-5)
    assert plan.to_bool().double().mean().item() == pytest.approx(plan.density, abs=1e-9)


def test_frames_that_straddle_blocks_have_the_density_of_their_neighbours() -> None:
    """1,560 tokens per frame, where the published code stops with an error."""
    plan = radial_plan((21, 30, 52))
    assert plan.density == pytest.approx(0.337, abs=5e-4)
    aligned = [radial_plan((21, 30, width)).density for width in (47, 64)]
    assert min(aligned) - 0.02 < plan.density < max(aligned) + 0.02


def test_decay_widens_the_bands() -> None:
    densities = [radial_plan((9, 32, 32), block=64, decay=decay).density for decay in (0.1, 0.5, 1.0, 4.0)]
    assert densities == sorted(densities)
    assert densities[0] < densities[-1]


def test_single_frame_is_dense() -> None:
    for rule in ("authors", "paper"):
        assert radial_plan((1, 5, 7), block=16, rule=rule, sink=False).density == 1.0


def test_plan_names_its_settings() -> None:
    plan = radial_plan((3, 4, 5), block=16, text_tokens=7, mask="element")
    assert plan.stats.method == "radial"
    assert plan.stats.details == {
        "grid": (3, 4, 5),
        "block": 16,
        "rule": "authors",
        "sink": True,
        "mask": "element",
        "decay": 0.2,
    }
    assert plan.always_q == ((60, 67),)
    assert plan.always_kv == ((0, 20), (60, 67))
    assert "decay" not in radial_plan((3, 4, 5), rule="paper").stats.details


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 0, 5)}, "grid must be three positive"),
        ({"grid": (3, 4)}, "grid must be three positive"),
        ({"grid": (3, 4.0, 5)}, "grid must be three positive"),
        ({"block": 0}, "block must be at least 1"),
        ({"decay": 0.0}, "decay must be a positive"),
        ({"decay": math.nan}, "decay must be a positive"),
        ({"text_tokens": -1}, "text_tokens must not be negative"),
        ({"rule": "Paper"}, "rule must be one of authors, paper, got 'Paper'"),
        ({"mask": "pixel"}, "mask must be one of block, element, got 'pixel'"),
    ],
)
def test_bad_arguments_say_what_is_accepted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        radial_plan(**{"grid": (3, 4, 5), **options})
