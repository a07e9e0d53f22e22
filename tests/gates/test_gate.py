"""The block gate, its selection and its teacher against their formulas, in loops over single numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.kernels.gate import teacher as teacher_module
from dit_accel.kernels.gate.gate import EMBEDDING, GateWeights, at_level, gate_logits
from dit_accel.kernels.gate.plan import gate_plan
from dit_accel.kernels.gate.pooling import pooled_keys, pooled_queries
from dit_accel.kernels.gate.reference import reference_blocks, reference_logits, reference_maps
from dit_accel.kernels.gate.teacher import block_maps, teacher

CASES = {
    "seed": st.integers(0, 2**16),
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 2),
    "length": st.integers(3, 33),
    "block": st.integers(2, 9),
}


def tokens(seed: int, batch: int, length: int, heads: int, width: int) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, S, H, D]``; those of a batch item in another scale, so that maxima are not all alike."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, length, heads, width, generator=generator) for _ in range(2))
    return q * 2, k + torch.randn(batch, 1, heads, width, generator=generator)


def random_gate(seed: int, heads: int, width: int, d_gate: int) -> GateWeights:
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = ((heads, width, d_gate), (heads, 3 * width, d_gate), (heads, EMBEDDING, 2 * d_gate))
    return GateWeights(*(torch.randn(shape, generator=generator) for shape in shapes))


def text_of(place: str, length: int, count: int) -> tuple[tuple[int, int], ...]:
    count = min(count, length)
    return {"absent": (), "before": ((0, count),), "after": ((length - count, length),)}[place]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    **CASES,
    width=st.integers(1, 4),
    d_gate=st.integers(1, 3),
    level=st.floats(0, 1),
    place=st.sampled_from(["absent", "before", "after"]),
    text=st.integers(1, 12),
    rule=st.one_of(st.integers(1, 6), st.floats(0.01, 0.9)),
)
def test_a_plan_keeps_the_blocks_of_the_formula(
    seed: int, batch: int, heads: int, length: int, block: int, width: int, d_gate: int, level: float, place: str,
    text: int, rule: int | float,
) -> None:  # fmt: skip
    q, k = tokens(seed, batch, length, heads, width)
    weights, ranges = random_gate(seed, heads, width, d_gate), text_of(place, length, text)
    by_count = isinstance(rule, int)
    chosen: dict[str, Any] = {"counts": torch.tensor([[rule]])} if by_count else {"threshold": rule}
    plan = gate_plan(q, k, at_level(weights, torch.tensor(level)), block=block, text=ranges, **chosen)
    sinks = {token // block for start, stop in ranges for token in range(start, stop)}
    columns = -(-length // block)
    for b in range(batch):
        for h in range(heads):
            logits = reference_logits(q[b, :, h], k[b, :, h], weights, level, h, block)
            oracle: dict[str, Any] = {"count": rule} if by_count else {"threshold": rule}
            rows = [set(range(columns))] * columns if len(sinks) == columns else reference_blocks(
                logits, sinks, **oracle
            )  # fmt: skip
            assert [set(row.nonzero().flatten().tolist()) for row in plan.to_bool()[b, h]] == rows


@pytest.mark.parametrize("level", [0.0, 0.003, 0.5, 0.96, 1.0])
def test_logits_are_those_of_the_formula(level: float) -> None:
    q, k = tokens(3, 2, 29, 3, 5)
    weights = random_gate(3, 3, 5, 4)
    found = gate_logits(pooled_queries(q, 8), pooled_keys(k, 8), at_level(weights, torch.tensor(level)))
    for b in range(2):
        for h in range(3):
            wanted = torch.tensor(reference_logits(q[b, :, h], k[b, :, h], weights, level, h, 8))
            assert torch.allclose(found[b, h], wanted, rtol=1e-4, atol=1e-4)


def test_heads_may_keep_different_numbers_of_blocks() -> None:
    q, k = tokens(0, 2, 40, 3, 4)
    counts = torch.tensor([[1], [3], [9]])
    plan = gate_plan(q, k, at_level(random_gate(0, 3, 4, 2), torch.tensor(0.5)), block=8, counts=counts)
    assert plan.counts.tolist() == [[[1] * 5, [3] * 5, [5] * 5]] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_pooled_in_long_ones(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in tokens(1, 1, 21, 2, 4))
    assert torch.allclose(pooled_queries(q, 8), pooled_queries(q.float(), 8))
    assert torch.equal(pooled_keys(k, 8)[..., :8], pooled_keys(k.float(), 8)[..., :8])
    gate = at_level(random_gate(1, 2, 4, 3), torch.tensor(0.7))
    plans = [gate_plan(a, b, gate, block=8, counts=torch.tensor([[1]])) for a, b in ((q, k), (q.float(), k.float()))]
    assert torch.equal(plans[0].to_bool(), plans[1].to_bool())


def test_noise_levels_change_the_gate_and_zeros_do_not() -> None:
    q, k = tokens(5, 1, 40, 1, 4)
    weights = random_gate(5, 1, 4, 3)
    silent = weights._replace(step=torch.zeros_like(weights.step))
    pooled = pooled_queries(q, 8), pooled_keys(k, 8)
    for gate, same in ((weights, False), (silent, True)):
        early, late = (gate_logits(*pooled, at_level(gate, torch.tensor(level))) for level in (0.99, 0.2))
        assert torch.equal(early, late) is same


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**CASES, strip=st.sampled_from([1, 1 << 22]), every=st.integers(1, 3))
def test_maps_are_those_of_the_whole_softmax(
    seed: int, batch: int, heads: int, length: int, block: int, strip: int, every: int
) -> None:
    q, k = tokens(seed, batch, length, heads, 3)
    k = k[:, : max(1, length - 2)]
    rows = torch.arange(0, -(-length // block), every)
    usual, teacher_module._STRIP = teacher_module._STRIP, strip
    try:
        greatest, share = block_maps(q, k, block, rows=None if every == 1 else rows)
    finally:
        teacher_module._STRIP = usual
    for b in range(batch):
        for h in range(heads):
            maps = reference_maps(q[b, :, h], k[b, :, h], block)
            for found, wanted in zip((greatest, share), maps, strict=True):
                assert torch.allclose(found[b, h], torch.tensor(wanted)[rows], atol=1e-6)


def test_the_teacher_is_a_distribution_over_blocks() -> None:
    found = teacher(torch.tensor([[0.1, 0.3], [0.0, 0.0], [0.2, 0.2]]))
    assert torch.allclose(found, torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.5, 0.5]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(1, 9, 3, 4)}, "do not fit together"),
        ({"q": torch.randn(1, 9, 3, 4), "k": torch.randn(1, 9, 3, 4)}, "2 heads of 4 channels.*3 of 4"),
        ({"k": torch.randn(1, 8, 2, 4)}, "9 and 8"),
        ({"block": 0}, "at least 1"),
        ({"threshold": 0.1}, "one of them"),
        ({"counts": None}, "one of them"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    q, k = tokens(0, 1, 9, 2, 4)
    gate = at_level(random_gate(0, 2, 4, 3), torch.tensor(0.5))
    given_: dict[str, Any] = {"q": q, "k": k, "gate": gate, "block": 4, "counts": torch.tensor([[1]])} | changes
    with pytest.raises(ValueError, match=message):
        gate_plan(given_.pop("q"), given_.pop("k"), given_.pop("gate"), **given_)


def test_a_gate_of_equal_ratings_keeps_the_first_blocks() -> None:
    q = torch.zeros(1, 20, 1, 2)
    plan = gate_plan(q, q, at_level(random_gate(0, 1, 2, 2), torch.tensor(0.5)), block=4, counts=torch.tensor([[2]]))
    assert plan.to_bool()[0, 0].nonzero()[:, 1].tolist() == [0, 1] * 5 and math.isnan(plan.density)
