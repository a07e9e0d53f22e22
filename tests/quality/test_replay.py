"""Replays against definitions written out in loops, on samplers whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.caching.limits import Limits
from dit_accel.caching.policies.static import Static
from dit_accel.caching.policies.transform import Transform
from dit_accel.caching.predictors.base import Predictor
from dit_accel.caching.predictors.reuse import Reuse
from dit_accel.caching.predictors.settled import Settled
from dit_accel.caching.predictors.taylor import Taylor
from dit_accel.caching.recipe import Cache
from dit_accel.caching.scopes.blocks import Whole
from dit_accel.caching.scopes.output import Output
from dit_accel.quality.errors import StepErrors, is_linear
from dit_accel.quality.replay import Replay, replay, schedule_errors
from dit_accel.quality.search import Rules, best_schedules, bisect_threshold
from dit_accel.quality.trace import Trace

from .toys import affine_trace, line_trace, two_experts


def reused_error(trace: Trace, source: int, step: int, residual: bool) -> float:
    """Root mean square over all branches and elements of what stays wrong, times the stride."""
    squares: list[float] = []
    for branch in ("cond", "uncond"):
        old = next(c for c in trace.calls if (c.step, c.branch) == (source, branch))
        new = next(c for c in trace.calls if (c.step, c.branch) == (step, branch))
        predicted = old.output - old.latents + new.latents if residual else old.output
        squares += ((predicted - new.output) ** 2).flatten().tolist()
    return trace.strides[step] * math.sqrt(sum(squares) / len(squares))


@pytest.mark.parametrize("residual", [False, True])
def test_errors_of_reuse_are_those_of_the_definition(residual: bool) -> None:
    trace = affine_trace(8)
    errors = StepErrors(trace, Reuse(), residual)
    for source, step in ((0, 1), (0, 5), (3, 7)):
        assert errors((source,), step) == pytest.approx(reused_error(trace, source, step, residual), rel=1e-5)


@pytest.mark.parametrize(
    "predictor",
    [
        Reuse(),
        Taylor(1),
        Taylor(1, along="sigma"),
        Taylor(1, along="log_snr"),
        Taylor(1, kappa=0.7),
        Taylor(2, kappa=None),
        Settled(Taylor(1), 0.25),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_products_give_what_tensors_give(predictor: Predictor, residual: bool) -> None:
    assert is_linear(predictor)
    errors = StepErrors(affine_trace(9, shift=0.8), predictor, residual)
    for history in ((2,), (4, 1), (5, 4, 0)):
        for step in (6, 8):
            assert errors(history, step) == pytest.approx(errors.plain(history[: predictor.depth], step), rel=1e-3)


def test_rules_that_are_not_linear_go_by_the_tensors() -> None:
    bounded = Taylor(2, kappa=0.5)
    assert not is_linear(bounded) and not is_linear(Settled(bounded))
    errors = StepErrors(affine_trace(9), bounded, False)
    assert errors((4, 2, 1), 8) == errors.plain((4, 2, 1), 8) > 0


@pytest.mark.parametrize("along", ["step", "sigma"])
def test_lines_are_continued_without_error(along: str) -> None:
    trace = line_trace(along=along)
    good = StepErrors(trace, Taylor(1, along=along), False)  # type: ignore[arg-type]
    other = StepErrors(trace, Taylor(1, along="sigma" if along == "step" else "step"), False)
    assert good((3, 1), 6) < 1e-4 < 0.01 < other((3, 1), 6)
    assert StepErrors(trace, Reuse(), False)((3,), 6) > 0.02


def test_static_schedules_are_followed_and_errors_are_of_the_latest_computed_step() -> None:
    trace = affine_trace(8)
    found = replay(trace, Cache(Output(False), Static(compute_steps=(0, 3, 4), steps=8)))
    assert found.computed == (True, False, False, True, True, False, False, False)
    sources = [None, 0, 0, None, None, 4, 4, 4]
    expected = [0.0 if s is None else reused_error(trace, s, step, False) for step, s in enumerate(sources)]
    assert found.errors == pytest.approx(expected, rel=1e-5) and found.distances == ()
    assert found.share == 3 / 8
    errors = StepErrors(trace, Reuse(), False)
    assert schedule_errors((0, 3, 4), trace, errors) == pytest.approx(found.errors)


def test_limits_come_before_the_policy() -> None:
    limits = Limits(warmup=2, cooldown=1, max_consecutive=2)
    found = replay(affine_trace(10), Cache(Output(), Static(compute_steps=(0,)), limits=limits))
    assert [s for s, computed in enumerate(found.computed) if computed] == [0, 1, 4, 7, 9]


def test_another_expert_starts_anew() -> None:
    trace = two_experts(affine_trace(8), 5)
    assert trace.fresh == {5}
    found = replay(trace, Cache(Output(False), Static(compute_steps=(0,), steps=8), Taylor(1)))
    assert [s for s, computed in enumerate(found.computed) if computed] == [0, 5]
    assert found.errors[6] == pytest.approx(reused_error(trace, 5, 6, False), rel=1e-5)
    assert schedule_errors((0,), trace, StepErrors(trace, Taylor(1), False)) == pytest.approx(found.errors)


def easycache(trace: Trace, threshold: float, warmup: int) -> list[bool]:
    """EasyCache (arXiv 2507.02860) as the paper writes it, on the first branch."""
    calls = [next(c for c in trace.calls if c.step == s) for s in range(trace.steps)]
    computed: list[bool] = []
    done: list[int] = []
    total = 0.0
    for step, call in enumerate(calls):
        compute = step < max(warmup, 1) or len(done) < 2
        if len(done) >= 2:
            c, b = calls[done[-1]], calls[done[-2]]
            rate = (c.output - b.output).abs().mean() / (c.latents - b.latents).abs().mean()
            change = rate * (call.latents - calls[step - 1].latents).abs().mean() / c.output.abs().mean()
            if not compute:
                total += float(change)
                compute = total >= threshold
        if compute:
            done.append(step)
            total = 0.0
        computed.append(compute)
    return computed


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2, 0.6, 5.0])
def test_dynamic_decisions_are_those_of_the_paper(threshold: float) -> None:
    trace = affine_trace(16, shift=0.5)
    cache = Cache(Output(), Transform(threshold), limits=Limits(warmup=3))
    assert list(replay(trace, cache).computed) == easycache(trace, threshold, 3)


def test_neighboring_thresholds_decide_otherwise_on_a_replay() -> None:
    trace = affine_trace(16, shift=0.5)

    def at(threshold: float) -> Replay:
        return replay(trace, Cache(Output(), Transform(threshold), limits=Limits(warmup=2)))

    for share in (0.9, 0.6, 0.4):
        bracket = bisect_threshold(at, lambda found, least=share: found.share >= least)  # type: ignore[misc]
        assert bracket.next_threshold is not None
        after = at(bracket.next_threshold)
        assert bracket.found.share >= share > after.share
        assert bracket.found.computed != after.computed


def test_the_best_schedule_of_a_trace_is_better_than_even_ones() -> None:
    trace = affine_trace(16, slope=2.0, shift=1.0)
    errors = StepErrors(trace, Reuse(), False)
    best = best_schedules(errors, Rules(16, max_gap=16))
    for every in (2, 4):
        even = tuple(range(0, 16, every))
        assert best[len(even)].cost <= sum(schedule_errors(even, trace, errors)) + 1e-12
        assert best[len(even)].cost == pytest.approx(sum(schedule_errors(best[len(even)].computed, trace, errors)))


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (Cache(Whole(), Static(compute_steps=(0,))), "real runs"),
        (Cache(Output(), Static(compute_steps=(0,)), decide="each"), "decide"),
    ],
)
def test_what_cannot_be_replayed_is_refused(cache: Cache, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replay(affine_trace(4), cache)


def test_branches_of_a_batch_weigh_alike() -> None:
    trace = affine_trace(6)
    halves = [StepErrors(Trace(tuple(c for c in trace.calls if c.branch == branch), 6, trace.strides, trace.grid),
                         Reuse(), True)((1,), 4) for branch in ("cond", "uncond")]  # fmt: skip
    both = StepErrors(trace, Reuse(), True)((1,), 4)
    assert both == pytest.approx(math.sqrt((halves[0] ** 2 + halves[1] ** 2) / 2), rel=1e-6)
    assert torch.isfinite(torch.tensor(both))
