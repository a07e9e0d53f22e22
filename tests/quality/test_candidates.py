"""Ladders of candidates: what they promise about themselves, checked on toys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_accel.caching.policies import SnrGap
from dit_accel.caching.predictors import Reuse
from dit_accel.caching.presets.snr_gap import PACE
from dit_accel.noise import Level
from dit_accel.quality.candidates import KINDS, MAX_GAP, Prospects
from dit_accel.quality.errors import StepErrors
from dit_accel.quality.replay import replay, schedule_errors
from dit_accel.quality.search import History, Rules, best_schedules
from dit_accel.quality.spec import CacheSpec
from dit_accel.quality.trace import WIDE, Trace, trace_dtype

from .toys import affine_trace, two_experts

TRACES = [affine_trace(16, slope=1.5, seed=seed, shift=0.6) for seed in (0, 1)]


def test_ladders_fall_in_share_and_predict_what_replays_give() -> None:
    prospects = Prospects(TRACES, max_gap=5)
    prospects.weights = tuple(1 + step / 4 for step in range(16))
    ladders = {ladder.name: ladder.rungs for ladder in prospects.ladders()}
    assert tuple(ladders) == KINDS
    for rungs in ladders.values():
        shares = [rung.share for rung in rungs]
        assert shares == sorted(shares, reverse=True) and len({rung.spec for rung in rungs}) == len(rungs)
        assert max(shares) < 1
    listed = ladders["listed steps"]
    assert [rung.share * 16 for rung in listed] == list(range(15, 3, -1))  # gaps of 5 need 4 computed steps
    predicted = [rung.predicted for rung in listed]
    assert predicted == sorted(predicted)
    for rung in listed:
        computed = rung.spec.computed
        assert computed is not None and computed[0] == 0
        assert max(b - a for a, b in zip(computed, (*computed[1:], 16), strict=True)) <= 5
        sums = [prospects.predicted(prospects.relative_errors(rung.spec, number)) for number in (0, 1)]
        assert max(sums) <= rung.predicted + 1e-9  # the worst prompt of each step is at least the worst prompt


def test_dynamic_rungs_decide_differently_and_share_what_they_say() -> None:
    prospects = Prospects(TRACES)
    rungs = next(ladder.rungs for ladder in prospects.ladders() if ladder.name == "EasyCache")
    decisions = []
    for rung in rungs:
        replays = [replay(trace, rung.spec.cache()) for trace in TRACES]
        assert rung.share == pytest.approx(sum(each.share for each in replays) / 2)
        assert all(each.computed[:2] == (True, True) and each.computed[-1] for each in replays)
        decisions.append(tuple(each.computed for each in replays))
    assert len(rungs) >= 3 and len(set(decisions)) == len(decisions)


def test_steps_by_noise_are_those_of_the_preset() -> None:
    prospects = Prospects(TRACES)
    levels = [Level(None, TRACES[0].at_step(step)[0].sigma) for step in range(16)]
    rungs = prospects.by_noise().rungs
    assert len(rungs) >= 4
    lists = {SnrGap(threshold, PACE).computed_steps(levels) for threshold in (1.4, 2.2, 3.6)}
    assert lists <= {rung.spec.computed for rung in rungs}
    for rung in rungs:
        computed, predictor = rung.spec.computed, rung.spec.predict()
        assert computed is not None and rung.spec.scope == "output"
        assert rung.spec.predictor in ("reuse", "settled line over steps")
        plain = [schedule_errors(computed, trace, StepErrors(trace, predictor, False)) for trace in TRACES]
        sums = [sum(errors) / trace.extent for errors, trace in zip(plain, TRACES, strict=True)]
        assert rung.predicted == pytest.approx(max(sums))


def with_levels(levels: list[float | None], flow: bool) -> list[Trace]:
    return [
        replace(trace, calls=tuple(replace(call, sigma=levels[call.step], flow=flow) for call in trace.calls))
        for trace in TRACES
    ]


def test_steps_by_noise_are_those_of_any_kind_of_noise() -> None:
    """Levels of diffusion with the same ratios of signal to noise have the same lists."""
    shares = [TRACES[0].at_step(step)[0].sigma for step in range(16)]
    added: list[float | None] = [1e6 if share is None or share == 1 else share / (1 - share) for share in shares]
    found, wanted = (Prospects(each).by_noise().rungs for each in (with_levels(added, flow=False), TRACES))
    assert [rung.spec.computed for rung in found] == [rung.spec.computed for rung in wanted] != []


def test_without_noise_levels_there_are_no_steps_by_noise() -> None:
    prospects = Prospects(with_levels([None] * 16, flow=True))
    assert prospects.by_noise().rungs == ()
    assert "steps by noise" not in {ladder.name for ladder in prospects.ladders()}


def test_steps_that_sparse_attention_leaves_dense_are_computed() -> None:
    ladders = Prospects(TRACES, dense_steps=4).ladders()
    assert tuple(ladder.name for ladder in ladders) == KINDS
    for ladder in ladders:
        for rung in ladder.rungs:
            assert rung.spec.computed is None or {0, 1, 2, 3} <= set(rung.spec.computed)
            assert rung.spec.computed is not None or rung.spec.warmup >= 4


def test_a_branch_that_is_called_at_some_steps_alone() -> None:
    """As SD3 calls its model once more in the first fifth, where it skips layers for guidance."""
    more = []
    for trace in TRACES:
        more.append(replace(trace, calls=tuple(c for c in trace.calls if c.branch == "cond" or 2 <= c.step < 5)))
    for trace in more:
        errors = StepErrors(trace, Reuse(), residual=False)
        for history, step in (((0,), 1), ((1,), 2), ((2,), 3), ((1,), 3), ((4,), 5)):
            assert errors(history, step) == pytest.approx(errors.plain(history, step), rel=1e-6)
    assert all(ladder.rungs for ladder in Prospects(more).ladders())


def test_another_expert_is_computed_first() -> None:
    kinds = ("listed steps", "steps by noise", "whole, reuse")
    ladders = Prospects([two_experts(trace, 6) for trace in TRACES]).ladders(kinds)
    assert tuple(ladder.name for ladder in ladders) == kinds
    for ladder in ladders:
        assert all(rung.spec.computed is not None and {0, 6} <= set(rung.spec.computed) for rung in ladder.rungs)


def best_for_outputs(predictor: str) -> list[tuple[int, ...]]:
    """The best schedules where outputs are predicted, by falling number of computed steps."""
    predict = CacheSpec(16, "output", predictor, (0,)).predict()
    errors = [StepErrors(trace, predict, residual=False) for trace in TRACES]

    def cost(history: History, step: int) -> float:
        return max(each(history, step) / trace.extent for each, trace in zip(errors, TRACES, strict=True))

    best = best_schedules(cost, Rules(16, predict.depth, max_gap=MAX_GAP))
    return [best[count].computed for count in sorted(best, reverse=True) if count < 16]


def test_whole_models_follow_outputs_of_the_same_predictor() -> None:
    prospects = Prospects(TRACES)
    ladders = {ladder.name: ladder.rungs for ladder in prospects.ladders(KINDS[3:])}
    assert set(ladders) == set(KINDS[3:])
    for kind, rungs in ladders.items():
        assert all(rung.spec.scope == "whole" and kind.endswith(rung.spec.predictor) for rung in rungs)
        assert [rung.spec.computed for rung in rungs] == best_for_outputs(kind.partition(", ")[2]) != []


def test_traces_of_different_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="one schedule"):
        Prospects([affine_trace(8), affine_trace(9)])
    with pytest.raises(ValueError, match="at least one"):
        Prospects([])


def test_large_traces_are_kept_in_half_precision() -> None:
    assert trace_dtype(WIDE // 4, 4) == torch.float32 and trace_dtype(WIDE // 4 + 1, 4) == torch.float16
