"""Combinations of policies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.caching.policies import (
    AllOf,
    AnyOf,
    Interval,
    Moment,
    Policy,
    Polynomial,
    ProbeDiff,
    Static,
    Transform,
    UnitDiff,
)
from dit_accel.caching.unit import Unit

from .sequences import RANDOM, STEPS, UNIT, decisions, forced_steps, rel, sights, tensors, walk


@RANDOM
@given(seed=st.integers(0, 10**6), every=st.integers(1, 5), any_of=st.booleans())
def test_combinations_ask_all_parts(seed: int, every: int, any_of: bool) -> None:
    """A probe that sums goes on summing at steps that the other part decides."""
    added, forced = walk(seed, STEPS), forced_steps(seed, STEPS)
    total, expected = 0.0, []
    for step in range(STEPS):
        computes = step == 0 or step in forced
        if not computes:
            total += rel(added[step], added[step - 1])
            answers = (step % every == 0, total >= 0.4)
            computes = any(answers) if any_of else all(answers)
        total = 0.0 if computes else total
        expected.append(computes)
    probe, interval = ProbeDiff(0.4, against="previous", accumulate=True), Interval(every)
    policy = interval | probe if any_of else interval & probe
    assert policy == (AnyOf if any_of else AllOf)((interval, probe))
    assert decisions(policy.judge(UNIT, STEPS), sights(STEPS, signal=tensors(added)), forced) == expected


def test_a_combination_decides_at_the_latest_moment_of_its_parts() -> None:
    policy = Static(mask=(1, 0)) | ProbeDiff(0.1, blocks=3)
    assert (policy.moment, policy.probe_blocks) == (Moment.PROBE, 3)
    policy = Interval(2) & Polynomial((1.0,), 0.1, "projection")
    assert (policy.moment, policy.signal) == (Moment.INPUT, "projection")
    assert (Interval(2) & Transform(0.1)).needs_output and not (Interval(2) & Interval(3)).needs_output
    nested = (Interval(2) & Interval(3)) | UnitDiff(0.1)
    assert nested.moment is Moment.UNIT


@pytest.mark.parametrize(
    "parts",
    [
        (ProbeDiff(0.1, blocks=1), ProbeDiff(0.1, blocks=2)),
        (ProbeDiff(0.1), Polynomial((1.0,), 0.1)),
        (Polynomial((1.0,), 0.1), Polynomial((1.0,), 0.1, "projection")),
        (UnitDiff(0.1), ProbeDiff(0.1)),
    ],
)
def test_parts_that_look_at_different_things_do_not_combine(parts: tuple[Policy, ...]) -> None:
    with pytest.raises(ValueError, match="look at the same thing"):
        AnyOf(parts)


def test_the_output_is_there_at_whole_calls_only() -> None:
    with pytest.raises(ValueError, match=r"Moment\.CALL"):
        Transform(0.1) | ProbeDiff(0.1)


def test_a_combination_tightens_the_parts_that_have_a_threshold() -> None:
    signals = [torch.ones(1, 4, 1), torch.full((1, 4, 1), 1.2)]
    judge = (Static(mask=(1, 0)) | ProbeDiff(0.3)).judge(UNIT, 2)
    judge.tighten(0.5)
    assert decisions(judge, sights(2, signal=signals), frozenset()) == [True, True]
    assert judge.value == pytest.approx(0.2)
    with pytest.raises(NotImplementedError, match="none of the combined"):
        (Interval(2) | Interval(3)).judge(UNIT, 4).tighten(0.5)


def test_combinations_give_each_unit_its_judge() -> None:
    units = [Unit(f"block {index}", "blocks", index, index) for index in range(3)]
    judges = (Interval(2) | UnitDiff(0.1, dynamic=True)).judges(units, 4)
    assert len({id(judge) for judge in judges}) == 3
