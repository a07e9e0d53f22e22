"""Rules with a threshold against their papers' formulas, word by word, on random sequences."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.caching.policies import (
    AllOf,
    Magnitude,
    Policy,
    Polynomial,
    ProbeDiff,
    Transform,
    UnitDiff,
    magnitude_ratios,
    token_norms,
)
from dit_accel.caching.unit import Unit

from .sequences import (
    RANDOM,
    STEPS,
    UNIT,
    decisions,
    forced_steps,
    mean_difference,
    rel,
    sights,
    sums_up,
    tensors,
    walk,
)


@RANDOM
@given(seed=st.integers(0, 10**6), threshold=st.floats(0.02, 0.6))
def test_dbcache_compares_with_the_latest_computed_step(seed: int, threshold: float) -> None:
    added, forced = walk(seed, STEPS), forced_steps(seed, STEPS)
    expected, latest = [], 0
    for step in range(STEPS):
        computes = step == 0 or step in forced or rel(added[step], added[latest]) >= threshold
        latest = step if computes else latest
        expected.append(computes)
    judge = ProbeDiff(threshold, blocks=2).judge(UNIT, STEPS)
    assert decisions(judge, sights(STEPS, signal=tensors(added)), forced) == expected


@RANDOM
@given(seed=st.integers(0, 10**6), threshold=st.floats(0.05, 1.0), of=st.sampled_from(["added", "output", "excess"]))
def test_dicache_sums_changes_against_the_step_before(seed: int, threshold: float, of: Any) -> None:
    entered, added, forced = walk(seed, STEPS), walk(seed + 7, STEPS, pace=0.1), forced_steps(seed, STEPS)
    after = [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(entered, added, strict=True)]

    def change(step: int, latest: int) -> float:
        if of == "added":
            return rel(added[step], added[step - 1])
        moved = rel(after[step], after[step - 1])
        return moved if of == "output" else abs(moved - rel(entered[step], entered[step - 1]))

    judge = ProbeDiff(threshold, 1, "previous", accumulate=True, of=of).judge(UNIT, STEPS)
    seen = sights(STEPS, signal=tensors(added), tokens=tensors(entered))
    assert decisions(judge, seen, forced) == sums_up(STEPS, forced, threshold, change)


@RANDOM
@given(
    seed=st.integers(0, 10**6),
    threshold=st.floats(0.05, 1.0),
    coefficients=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
)
def test_teacache_sums_a_polynomial_of_the_change(seed: int, threshold: float, coefficients: list[float]) -> None:
    modulated, forced = walk(seed, STEPS), forced_steps(seed, STEPS)

    def change(step: int, latest: int) -> float:
        d = rel(modulated[step], modulated[step - 1])
        return sum(c * d**power for power, c in enumerate(reversed(coefficients)))

    judge = Polynomial(tuple(coefficients), threshold).judge(UNIT, STEPS)
    expected = sums_up(STEPS, forced, threshold, change)
    assert decisions(judge, sights(STEPS, signal=tensors(modulated)), forced) == expected


@RANDOM
@given(seed=st.integers(0, 10**6), threshold=st.floats(0.01, 0.5), max_skips=st.integers(0, 6))
def test_magcache_multiplies_ratios_and_sums_errors(seed: int, threshold: float, max_skips: int) -> None:
    draw, forced = random.Random(seed), forced_steps(seed, STEPS)
    ratios = [1.0, *(draw.uniform(0.9, 1.1) for _ in range(STEPS - 1))]
    always = draw.randrange(1, STEPS)
    expected, product, error, skipped = [], 1.0, 0.0, 0
    for step in range(STEPS):
        computes = step == 0 or step in forced
        if not computes:
            product *= ratios[step]
            error += abs(1 - product)
            skipped += 1
            computes = not (error < threshold and skipped <= max_skips) or step == always
        if computes:
            product, error, skipped = 1.0, 0.0, 0
        expected.append(computes)
    judge = Magnitude(tuple(ratios), threshold, max_skips, (always,)).judge(UNIT, STEPS)
    assert decisions(judge, sights(STEPS), forced) == expected


@RANDOM
@given(calibrated=st.integers(2, 60), steps=st.integers(2, 60))
def test_magcache_takes_the_nearest_ratio(calibrated: int, steps: int) -> None:
    """Each step has the ratio of a calibrated one that lies as near as any, from the first to the last."""
    ratios = tuple(1.0 + 0.001 * index for index in range(calibrated))
    judge = Magnitude(ratios, 100.0, 1000).judge(UNIT, steps)
    product = 1.0
    seen = sights(steps)
    judge.note(seen[0], True, None)
    for step in range(1, steps):
        before, product_before = judge.value or 0.0, product
        assert not judge.wants_compute(seen[step])
        assert judge.value is not None
        product = 1 + (judge.value - before)  # ratios from 1 up: errors are not folded
        index = round((product / product_before - 1) / 0.001)
        place = step / (steps - 1) * (calibrated - 1)
        assert abs(index - place) <= 0.5 + 1e-6


def test_magcache_takes_its_own_ratios_for_its_own_number_of_steps() -> None:
    judge = Magnitude((1.0, 1.5, 0.5), 1.2, 9).judge(UNIT, 3)
    seen = sights(3)
    judge.note(seen[0], True, None)
    assert not judge.wants_compute(seen[1])
    assert judge.value == pytest.approx(0.5)
    assert not judge.wants_compute(seen[2])
    assert judge.value == pytest.approx(0.5 + 0.25)


def test_a_calibration_is_the_mean_ratio_of_token_lengths() -> None:
    draw = random.Random(3)
    residuals = [[[draw.uniform(-1, 1) for _ in range(3)] for _ in range(5)] for _ in range(4)]
    expected = [1.0]
    for before, now in pairwise(residuals):
        lengths = [
            sum(x * x for x in a) ** 0.5 / sum(x * x for x in b) ** 0.5 for a, b in zip(now, before, strict=True)
        ]
        expected.append(sum(lengths) / len(lengths))
    norms = [token_norms(torch.tensor(residual)[None]) for residual in residuals]
    assert magnitude_ratios(norms) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ([], "got none"),
        ([torch.ones(1, 3), torch.ones(1, 4)], "equally many tokens"),
        ([torch.zeros(1, 3), torch.ones(1, 3)], "zero or not finite"),
    ],
)
def test_a_calibration_that_is_none_is_refused(norms: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        magnitude_ratios(norms)


@RANDOM
@given(seed=st.integers(0, 10**6), threshold=st.floats(0.02, 0.6))
def test_easycache_takes_the_rate_of_the_two_latest_computed_steps(seed: int, threshold: float) -> None:
    latents, outputs, forced = walk(seed, STEPS), walk(seed + 5, STEPS), forced_steps(seed, STEPS)
    expected, done, total = [], list[int](), 0.0
    for step in range(STEPS):
        computes = step == 0 or step in forced or len(done) < 2
        if not computes:
            b, c = done[-2:]
            rate = mean_difference(outputs[c], outputs[b]) / mean_difference(latents[c], latents[b])
            size = sum(map(abs, outputs[c])) / len(outputs[c])
            total += rate * mean_difference(latents[step], latents[step - 1]) / size
            computes = total >= threshold
        if computes:
            done.append(step)
            total = 0.0
        expected.append(computes)
    judge = Transform(threshold).judge(UNIT, STEPS)
    seen = sights(STEPS, latents=tensors(latents))
    assert decisions(judge, seen, forced, tensors(outputs)) == expected


def test_a_threshold_of_zero_computes_even_where_a_polynomial_is_negative() -> None:
    signals = tensors(walk(1, STEPS))
    judge = Polynomial((-1.0,), 0.0).judge(UNIT, STEPS)
    assert all(decisions(judge, sights(STEPS, signal=signals), frozenset()))


def test_easycache_without_an_output_says_so() -> None:
    judge = Transform(0.1).judge(UNIT, 4)
    with pytest.raises(ValueError, match="needs the model's output"):
        judge.note(sights(1)[0], True, None)


@RANDOM
@given(
    seed=st.integers(0, 10**6),
    threshold=st.floats(0.02, 0.3),
    dynamic=st.booleans(),
    most=st.sampled_from([None, 0.05, 1.0]),
)
def test_dbprune_decides_for_each_block(seed: int, threshold: float, dynamic: bool, most: float | None) -> None:
    """Blocks in turn, each against its input when it was computed last; the first changes of a step raise the bar."""
    blocks = 8
    units = [Unit(f"block {index}", "blocks", index, index) for index in range(blocks)]
    inputs = [walk(seed + block, STEPS, pace=0.1) for block in range(blocks)]
    seen = [sights(STEPS, signal=tensors(entered)) for entered in inputs]
    judges = UnitDiff(threshold, dynamic=dynamic, most=most).judges(units, STEPS)
    computed_at = [0] * blocks
    for step in range(STEPS):
        measured: list[float] = []
        for block in range(blocks):
            sight = seen[block][step]
            computes = True
            if step > 0:
                change = rel(inputs[block][step], inputs[block][computed_at[block]])
                bar = threshold
                first = [each for each in measured[:5] if each > 0]
                if dynamic and first:
                    raised = 1.25 * sum(first) / len(first)
                    if raised < (2 * threshold if most is None else most):
                        bar = max(raised, threshold)
                measured.append(change)
                computes = change >= bar
                assert judges[block].wants_compute(sight) is computes
                assert judges[block].value == pytest.approx(change)
            judges[block].note(sight, computes, None)
            computed_at[block] = step if computes else computed_at[block]


def test_a_dynamic_threshold_needs_judges_that_know_each_other() -> None:
    with pytest.raises(ValueError, match=r"judges\(\)"):
        UnitDiff(0.1, dynamic=True).judge(UNIT, 4)


LOOKING: list[Policy] = [
    ProbeDiff(0.3),
    ProbeDiff(0.3, against="previous", accumulate=True),
    Polynomial((1.0, 0.0), 0.3),
    UnitDiff(0.3),
]


@pytest.mark.parametrize("policy", LOOKING, ids=repr)
def test_no_signal_is_an_error_that_says_what_to_do(policy: Policy) -> None:
    with pytest.raises(ValueError, match="Take a policy that looks at something else"):
        policy.judge(UNIT, 4).wants_compute(sights(1)[0])


@pytest.mark.parametrize("policy", LOOKING, ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_compute(policy: Policy, bad: float) -> None:
    first, second = torch.ones(1, 4, 1), torch.full((1, 4, 1), bad)
    judge = policy.judge(UNIT, 3)
    seen = sights(3, signal=[first, second, first])
    assert decisions(judge, seen, frozenset()) == [True, True, True]  # NaN against anything, anything against NaN


@pytest.mark.parametrize("policy", LOOKING, ids=repr)
def test_another_shape_computes(policy: Policy) -> None:
    judge = policy.judge(UNIT, 3)
    seen = sights(3, signal=[torch.ones(1, 4, 1), torch.ones(1, 6, 1), torch.ones(1, 6, 1)])
    assert decisions(judge, seen, frozenset()) == [True, True, False]


@pytest.mark.parametrize("policy", LOOKING, ids=repr)
def test_tightening_multiplies_the_threshold(policy: Policy) -> None:
    signals = [torch.ones(1, 4, 1), torch.full((1, 4, 1), 1.2)]  # a change of 0.2
    judge = policy.judge(UNIT, 2)
    assert decisions(judge, sights(2, signal=signals), frozenset()) == [True, False]
    judge = policy.judge(UNIT, 2)
    judge.tighten(0.5)
    assert decisions(judge, sights(2, signal=signals), frozenset()) == [True, True]


@pytest.mark.parametrize("policy", LOOKING, ids=repr)
def test_half_precision_is_measured_in_float32(policy: Policy) -> None:
    """A sum in float16 of so many numbers would be infinite, and the change 0."""
    signals = [torch.full((1, 70000, 1), value, dtype=torch.float16) for value in (2.0, 2.5)]
    judge = policy.judge(UNIT, 2)
    assert decisions(judge, sights(2, signal=signals), frozenset()) == [True, False]
    assert judge.value == pytest.approx(0.25)


def test_what_was_seen_is_kept_apart_from_the_model() -> None:
    """Blocks may write into the tensors that a judge was shown."""
    signal = torch.ones(1, 4, 1)
    judge = ProbeDiff(0.1).judge(UNIT, 2)
    first, second = sights(2, signal=[signal, torch.ones(1, 4, 1)])
    judge.note(first, True, None)
    signal.fill_(100.0)
    assert not judge.wants_compute(second)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProbeDiff(-0.1),
        lambda: ProbeDiff(float("nan")),
        lambda: ProbeDiff(0.1, blocks=0),
        lambda: ProbeDiff(0.1, against="later"),  # type: ignore[arg-type]
        lambda: ProbeDiff(0.1, of="all"),  # type: ignore[arg-type]
        lambda: Polynomial((), 0.1),
        lambda: Polynomial((1.0,), -1.0),
        lambda: Magnitude((), 0.1, 2),
        lambda: Magnitude((1.0, 0.0), 0.1, 2),
        lambda: Magnitude((1.0, 1.0), 0.1, -1),
        lambda: Magnitude((1.0, 1.0), 0.1, 2, (2,)),
        lambda: Transform(float("inf")),
        lambda: UnitDiff(0.1, window=0),
        lambda: AllOf(()),
    ],
)
def test_settings_outside_their_range_are_refused(make: Callable[[], Policy]) -> None:
    with pytest.raises(ValueError, match=r"got|least one|positive numbers|lists indices"):
        make()


def test_ratios_need_the_number_of_steps() -> None:
    with pytest.raises(ValueError, match="set_step"):
        Magnitude((1.0, 1.0), 0.1, 2).judge(UNIT, None)
