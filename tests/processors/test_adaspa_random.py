"""AdaSpa's level rule on random recalls, in the paper's own words: sparsities, which must keep their mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.controls import SiteInfo
from dit_accel.kernels.search.budget import head_shifts
from dit_accel.layout import TokenLayout
from dit_accel.processors import AdaSpaAttnProcessor

SITE = SiteInfo("blocks.1.attn1", "self", 1, 3, "transformer")
GRID = (5, 8, 16)  # 640 tokens: ten blocks of 64


def levels(recalls: list[float], sparsity: float) -> list[float]:
    """Sparsity of each head: the n best get (1 + S) / 2, the n worst (3S - 1) / 2, where n have a recall above 0.8."""
    count = min(len([recall for recall in recalls if recall > 0.8]), len(recalls) // 2)
    order = sorted(range(len(recalls)), key=lambda head: recalls[head])
    found = [sparsity] * len(recalls)
    for head in order[len(order) - count :]:
        found[head] = (1 + sparsity) / 2
    for head in order[:count]:
        found[head] = (3 * sparsity - 1) / 2
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(recalls=st.lists(st.floats(0, 1), min_size=1, max_size=12, unique=True))
def test_random_recalls_shift_heads_by_the_rule(recalls: list[float]) -> None:
    wanted = levels(recalls, 0.8)
    assert sum(wanted) / len(wanted) == pytest.approx(0.8)
    shifts = head_shifts(torch.tensor([recalls], dtype=torch.float64))[0].tolist()
    assert [0.8 - 0.1 * shift for shift in shifts] == pytest.approx(wanted)


def heads_of(concentrated: list[bool]) -> tuple[Tensor, Tensor]:
    """Heads whose queries see nothing but their own block, and heads that see all alike."""
    own = torch.eye(10).repeat_interleave(64, 0)
    query = torch.stack([own * (30.0 if sharp else 0.01) for sharp in concentrated])[None]
    noise = torch.randn(1, len(concentrated), 640, 10, generator=torch.Generator().manual_seed(0)) / 100
    return query + noise, own.expand(1, len(concentrated), -1, -1) + noise.flip(2)


def test_published_sparsity_has_the_published_levels() -> None:
    """At 0.8 of ten blocks: a concentrated head keeps one, 0.9 sparse, a spread one three, 0.7, others two."""
    concentrated = [True, False, False, True, False, False, False]
    processor = AdaSpaAttnProcessor()
    query, key = heads_of(concentrated)
    setup = processor.set_up(SITE, TokenLayout.video_only(GRID), query.device)
    kept = processor.find_plan(query, key, setup, scale=None).to_bool()[0].sum(-1)
    assert all((row == row[0]).all() for row in kept)  # row by row alike
    counts = kept[:, 0].tolist()
    assert [counts[head] for head, sharp in enumerate(concentrated) if sharp] == [1, 1]
    assert sorted(counts[head] for head, sharp in enumerate(concentrated) if not sharp) == [2, 2, 2, 3, 3]
    assert math.isclose(sum(counts), 7 * 2)
