"""The masks of the grid method and what chooses among them, against loops over single pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels.grid.lines import Lines, best_line, grid_lines
from dit_accel.kernels.grid.masks import chosen_plan
from dit_accel.kernels.grid.probe import Probe, grid_errors, mask_errors, probe_of
from dit_accel.layout import TokenLayout
from dit_accel.plan.grid import band, in_sequence, line_strides, spatial_temporal_masks, stride_masks

from .grid_oracle import best_of, blocks_with, kept_pairs, layouts, others_in_order, places, tensors, with_others

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@EXAMPLES
@given(
    layout=layouts(),
    block=st.integers(2, 6),
    density=st.floats(0.05, 1),
    first_frame=st.booleans(),
)
def test_bands_are_those_of_the_formula(layout: TokenLayout, block: int, density: float, first_frame: bool) -> None:
    masks, _ = spatial_temporal_masks(layout, densities=[density], block=block, first_frame=first_frame)
    found = chosen_plan(masks, torch.tensor([[0, 1]])).element_mask()
    tokens = places(layout)
    video = [place for place, token in enumerate(tokens) if token is not None]
    by_frame = sorted(video, key=lambda place: tokens[place])
    by_pixel = sorted(video, key=lambda place: (*tokens[place][1:], tokens[place][0]))
    for c, order in enumerate((by_frame, by_pixel)):
        order = order + others_in_order(layout, tokens)
        count = -(-len(order) // block)
        always = with_others(count, blocks_with(order, block, tokens, lambda token: token is None))
        if first_frame and c == 0:
            sink = blocks_with(order, block, tokens, lambda token: token is not None and token[0] == 0)
            always |= set(itertools.product(range(count), sink))
        mask, kept = kept_pairs(order, block, density, always)
        assert torch.equal(found[0, c], mask)
        assert masks.densities[c] == pytest.approx(kept) == pytest.approx(mask.double().mean().item())


@EXAMPLES
@given(
    layout=layouts(frames=1),
    block=st.integers(2, 6),
    density=st.floats(0.05, 1),
    batch=st.integers(1, 3),
    rows=st.integers(1, 5),
    data=st.data(),
)
def test_lines_are_those_of_the_formula(
    layout: TokenLayout, block: int, density: float, batch: int, rows: int, data: st.DataObject
) -> None:
    tokens = places(layout)
    video = sorted((place for place, token in enumerate(tokens) if token is not None), key=lambda i: tokens[i])
    sizes = st.lists(st.integers(1, len(video)), min_size=1, max_size=3, unique=True)
    strides = tuple(data.draw(sizes))
    q, k, _ = tensors(batch, 2, layout.length, data.draw(st.integers(0, 99)))
    masks, _ = stride_masks(layout, strides, densities=[density], block=block)
    asked = torch.tensor(video[-rows:])
    choice, before = best_line(q, k, Lines(asked, torch.tensor(video), strides))
    found = chosen_plan(masks, choice, before).element_mask()
    weights = (q[:, :, asked].double() @ k.double().transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    for b, h in itertools.product(range(batch), range(2)):
        c, phase = best_of(weights[b, h], video, strides)
        turned = sorted(range(len(video)), key=lambda i: ((i - phase) % strides[c], i))
        order = [video[i] for i in turned] + others_in_order(layout, tokens)
        count = -(-len(order) // block)
        others = blocks_with(order, block, tokens, lambda token: token is None)
        longest = max(len(range(p, len(video), strides[c])) for p in range(strides[c]))
        always = with_others(count, others | {i // block for i in range(longest)})
        mask, kept = kept_pairs(order, block, density, always)
        assert torch.equal(found[b, h], mask)
        assert masks.densities[c] == pytest.approx(kept)
        line = torch.tensor([video[i] for i in range(phase, len(video), strides[c])])
        assert mask[:, line].all() and mask[line].all()  # the line sees everything and is seen by all


@EXAMPLES
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 19),
    block=st.integers(1, 6),
    with_values=st.booleans(),
    scale=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 99),
)
def test_errors_are_those_of_the_output(
    batch: int, length: int, block: int, with_values: bool, scale: float | None, seed: int
) -> None:
    q, k, v = tensors(batch, 2, length, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(length, (4,), generator=generator)
    kept = torch.rand(3, 4, -(-length // block), generator=generator) < 0.5
    kept[..., 0] = True  # a query sees something
    block_of = torch.stack([torch.randperm(length, generator=generator) // block for _ in range(3)])
    errors = mask_errors(q, k, v if with_values else None, Probe(rows, kept, block_of), scale=scale)
    # Uncorrelated values of variance 1 are the columns of an identity, added up instead of averaged.
    values = v.double() if with_values else torch.eye(length, dtype=torch.float64).expand(batch, 2, -1, -1)
    for b, h, c in itertools.product(range(batch), range(2), range(3)):
        total = 0.0
        for i, row in enumerate(rows.tolist()):
            scores = k[b, h].double() @ q[b, h, row].double() * (8**-0.5 if scale is None else scale)
            seen = torch.tensor([bool(kept[c, i, block_of[c, j]]) for j in range(length)])
            lost = scores.softmax(0) @ values[b, h]
            lost -= scores.masked_fill(~seen, -torch.inf).softmax(0) @ values[b, h]
            total += float(lost.square().mean() if with_values else lost.square().sum())
        assert errors[b, h, c].item() == pytest.approx(total / 4, rel=1e-4, abs=1e-9)


def test_scores_of_many_heads_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.kernels.grid import probe as module

    layout = TokenLayout.video_only((3, 4, 5))
    masks, parts = spatial_temporal_masks(layout, densities=[0.4], block=7, first_frame=True)
    probe = probe_of(masks, parts, torch.arange(0, 60, 9))
    q, k, v = tensors(2, 5, 60)
    lines = Lines(probe.rows, in_sequence(layout), (5, 20))
    whole = mask_errors(q, k, v, probe), *best_line(q, k, lines)
    monkeypatch.setattr(module, "_SCORE_BYTES", 2 * 7 * 60 * 4 * 2)  # two heads at a time
    assert module.heads_at_a_time(q, probe.rows, 60) == 2
    parted = mask_errors(q, k, v, probe), *best_line(q, k, lines)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(whole, parted, strict=True))


def test_density_is_as_near_as_blocks_allow() -> None:
    for length, block, density in itertools.product((2560, 5000), (64, 128), (0.05, 0.1, 0.25, 0.5, 1.0)):
        mask = band(length, length, block, density)
        least = max(density, 1 / -(-length // block))  # the diagonal stays
        assert mask.density == pytest.approx(least, abs=1.01 * (block / length) ** 2)
        reach = [i - j for i, j in mask.blocks.nonzero().tolist()]
        published = length * (1 - math.sqrt(1 - least))
        if density < 1:
            assert max(reach) * block == pytest.approx(published, abs=1.5 * block)
    assert band(5000, 5000, 128, 0.25) is band(5000, 5000, 128, 0.25)  # all sites of a model share it


def test_text_counts_in_the_density() -> None:
    mask = band(2560, 2560 - 256, 128, 0.3)
    assert mask.density == pytest.approx(0.3, abs=0.002)
    assert mask.blocks[18:].all() and mask.blocks[:, 18:].all() and not mask.blocks[0, 17]


def test_strides_fit_the_grid() -> None:
    assert line_strides((6, 8, 8), (1, 2)) == (8, 16, 64, 128)
    assert line_strides((3, 5, 7), (1, 2)) == (7, 14, 35)  # 70 leaves most lines a single token
    assert line_strides((1, 9, 4), (2, 1)) == (4, 8)  # an image has no frames to skip
    assert line_strides((4, 1, 3), (1,)) == (3,)
    with pytest.raises(ValueError, match=r"\(1, 5, 1\).*from 2 to half.*give other multiples, or use another method"):
        line_strides((1, 5, 1), (1,))


def test_the_operators_tell_the_compiler_their_shapes() -> None:
    layout = TokenLayout.video_only((3, 4, 5))
    masks, parts = spatial_temporal_masks(layout, densities=[0.4], block=7, first_frame=True)
    q, k, v = tensors(2, 3, 60)
    probe = probe_of(masks, parts, torch.arange(0, 60, 9))
    checks = ("test_schema", "test_faketensor")
    for values in (v, None):
        torch.library.opcheck(grid_errors, (q, k, values, *probe, 0.3), test_utils=checks)
    torch.library.opcheck(grid_lines, (q, k, probe.rows, in_sequence(layout), [5, 20], 0.3), test_utils=checks)
