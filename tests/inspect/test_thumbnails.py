"""Small pictures equal means over the elements of each cell."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.controls import block_mass
from dit_accel.inspect.thumbnails import cell_of, mask_picture, mass_picture
from dit_accel.kernels.sparse_plan import plan_from_blocks

from .oracle import softmax, video


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(["none", "shared", "by head", "keys apart"]),
    st.integers(1, 5),
    st.integers(0, 999),
)
def test_masks_equal_means_over_elements(grid, before, after, order, side, seed):
    layout, generator = video(grid, before, after), torch.Generator().manual_seed(seed)
    tokens, heads = layout.length, 2
    rows, columns = math.ceil(tokens / 3), math.ceil(tokens / 2)
    keep = torch.rand(2, heads, rows, columns, generator=generator) < 0.5
    lead = {"none": None, "shared": (), "by head": (1, heads), "keys apart": ()}[order]
    orders = {}
    if lead is not None:
        shuffled = torch.rand(*lead, tokens, generator=generator).argsort(-1)
        orders = {"order": shuffled}
    if order == "keys apart":
        orders["kv_order"] = torch.rand(1, heads, tokens, generator=generator).argsort(-1)
    plan = plan_from_blocks(keep, q_len=tokens, kv_len=tokens, block_q=3, block_kv=2, **orders)
    found = mask_picture(plan, layout, side)
    start, stop = layout.visual
    mask = plan.element_mask()[..., start:stop, start:stop].double().mean(0)
    cells = min(side, stop - start)
    cell = cell_of(torch.arange(stop - start), stop - start, cells)
    assert found.shape == (heads, cells, cells)
    for i in range(cells):
        for j in range(cells):
            expected = mask[:, cell == i][:, :, cell == j].mean((1, 2))
            assert torch.allclose(found[:, i, j].double(), expected, atol=1e-5)


@pytest.mark.parametrize("side", [1, 3, 6])
def test_attention_equals_means_over_elements(side):
    """Cells that are whole blocks, so that nothing is spread."""
    query, key = torch.randn(2, 2, 24, 8), torch.randn(2, 2, 24, 8)
    found = mass_picture(block_mass(query, key, 4), 24, 4, side)
    weights = softmax(query, key).mean(0)
    parts = weights.unflatten(-1, (side, -1)).sum(-1).unflatten(-2, (side, -1)).mean(-2)
    assert torch.allclose(found.double(), parts * side, atol=1e-5)


def test_uniform_attention_is_one_everywhere():
    nothing = torch.zeros(1, 1, 29, 4)
    assert torch.allclose(mass_picture(block_mass(nothing, nothing, 4), 29, 4, 5), torch.ones(1, 5, 5), atol=1e-4)
