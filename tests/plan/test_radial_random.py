"""Radial plans of random small grids against the published rules, pair by pair, and the published densities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.plan import radial_plan

Grid = tuple[int, int, int]
grids = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 5))


def bits(number: int) -> int:
    """Bit length, by counting halvings."""
    count = 0
    while number:
        number, count = number // 2, count + 1
    return count


def authors_keep(distance: int, offset: int, frame: int, block: int, decay: float) -> bool:
    """Whether the authors' code keeps a pair of tokens so many frames and raster positions apart."""
    power = 2 ** bits(frame)  # the smallest power of two above the tokens of a frame
    share = power / 2 ** bits(distance)
    if share < 128 and distance % math.floor(128 / share):
        return False
    width = frame if distance <= 1 else max(block, decay * share)
    return offset <= width


def paper_keeps(distance: int, offset: int, frame: int) -> bool:
    """The same by the formula of the paper."""
    power = 2 ** math.floor(math.log2(max(distance, 1)))
    band = power <= frame and offset + 1 <= frame / power
    return band or (distance % math.ceil(power / frame) == 0 and offset == 0)


def kept_pairs(grid: Grid, text: int, rule: str, block: int, decay: float, sink: bool) -> list[list[bool]]:
    """Every pair of tokens; text behind the video sees everything and is seen by all."""
    frame = grid[1] * grid[2]
    video = grid[0] * frame

    def keeps(q: int, kv: int) -> bool:
        if q >= video or kv >= video or (sink and kv < frame):
            return True
        distance, offset = abs(q // frame - kv // frame), abs(q % frame - kv % frame)
        if rule == "paper":
            return paper_keeps(distance, offset, frame)
        return authors_keep(distance, offset, frame, block, decay)

    return [[keeps(q, kv) for kv in range(video + text)] for q in range(video + text)]


def authors_keep_block(rows: list[list[bool]]) -> bool:
    """More than 60 % of the columns that hold anything have more than a third of their rows kept."""
    kept = [sum(column) for column in zip(*rows, strict=True)]
    touched = sum(count > 0 for count in kept)
    return 10 * sum(3 * count > len(rows) for count in kept) > 6 * touched


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    grid=grids,
    text=st.sampled_from([0, 1, 7, 20]),
    block=st.sampled_from([4, 8, 16]),
    decay=st.floats(0.05, 8),
    rule=st.sampled_from(["authors", "paper"]),
    sink=st.booleans(),
    mask=st.sampled_from(["element", "block"]),
)
def test_random_plans_are_the_rule(
    grid: Grid, text: int, block: int, decay: float, rule: str, sink: bool, mask: str
) -> None:
    plan = radial_plan(grid, block=block, decay=decay, rule=rule, sink=sink, text_tokens=text, mask=mask)
    wanted = kept_pairs(grid, text, rule, block, decay, sink)
    if mask == "element":
        assert plan.element_mask()[0, 0].tolist() == wanted
        assert plan.density == pytest.approx(sum(map(sum, wanted)) / len(wanted) ** 2, abs=1e-12)
        return
    frame, video, starts = grid[1] * grid[2], math.prod(grid), range(0, len(wanted), block)
    blocks = []
    for q in starts:
        row = []
        for kv in starts:
            tile = [line[kv : kv + block] for line in wanted[q : q + block]]
            text_in = max(q, kv) + block > video and text > 0
            sink_in = sink and kv < frame
            kept = authors_keep_block(tile) if rule == "authors" else any(map(any, tile))
            row.append(kept or text_in or sink_in)
        blocks.append(row)
    assert plan.to_bool()[0, 0].tolist() == blocks
    assert plan.density == pytest.approx(plan.element_mask().double().mean().item(), abs=1e-12)


@pytest.mark.parametrize(("decay", "published"), [(0.95, 0.275), (1.0, 0.293)])
def test_density_of_hunyuan_video_is_that_of_the_published_rule(decay: float, published: float) -> None:
    """117 frames of 768x1280, where text alone is the sink; Wan's 0.287 and others are in test_radial.py."""
    plan = radial_plan((30, 48, 80), decay=decay, sink=False)
    assert plan.density == pytest.approx(published, abs=5e-4)
    assert torch.equal(plan.counts, plan.full_counts)
