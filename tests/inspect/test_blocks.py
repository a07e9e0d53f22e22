"""Recall and density of block maps equal those counted block by block; coarser maps equal those of longer blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.controls import block_mass
from dit_accel.inspect.blocks import coarser, density_for, recall_at


def by_hand(row, density):
    """Mass of the heaviest blocks, the last of them in part."""
    wanted, found = density * len(row), 0.0
    for mass in sorted(row, reverse=True):
        part = min(1.0, wanted)
        found, wanted = found + part * mass, wanted - part
        if wanted <= 1e-12:
            break
    return found


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(0, 999), st.data())
def test_recall_equals_the_sum_of_the_heaviest_blocks(batch, heads, rows, columns, seed, data):
    mass = torch.rand(batch, heads, rows, columns, generator=torch.Generator().manual_seed(seed)).pow(3) + 1e-3
    mass = mass / mass.sum(-1, keepdim=True)
    densities = tuple(data.draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=3)))
    found = recall_at(mass, densities)
    assert found.shape == (heads, len(densities))
    for head in range(heads):
        for at, density in enumerate(densities):
            every = [by_hand(row, density) for item in mass for row in item[head].tolist()]
            assert float(found[head, at]) == pytest.approx(sum(every) / len(every), abs=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(0, 999), st.floats(0.05, 0.95))
def test_the_density_for_a_recall_has_that_recall(columns, seed, level):
    mass = torch.rand(1, 1, 1, columns, generator=torch.Generator().manual_seed(seed)) + 0.01
    mass = mass / mass.sum()
    density = float(density_for(mass, level))
    assert float(recall_at(mass, (density,))) == pytest.approx(level, abs=1e-4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
def test_coarser_maps_are_those_of_longer_blocks(tokens, block, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, 2, tokens, 4, generator=generator) for _ in range(2))
    found = coarser(block_mass(query, key, block), tokens, block, factor)
    expected = block_mass(query, key, block * factor)
    assert found.shape == expected.shape == (2, 2, *(2 * [math.ceil(tokens / (block * factor))]))
    assert torch.allclose(found, expected, atol=1e-5)
