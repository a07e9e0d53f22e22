"""Dense steps and layers, and factors on budgets by step, layer and head."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import Schedule


@pytest.mark.parametrize(
    ("dense_steps", "steps", "count"),
    [
        (12, 50, 12),
        (12, 8, 8),
        (0, 50, 0),
        (1, 50, 1),
        (1.0, 50, 50),
        (0.0, 50, 0),
        (0.24, 50, 12),
        (0.24, 20, 5),
        (0.01, 50, 1),
        (0.07, 100, 7),
    ],
)
def test_first_steps_are_dense(dense_steps: float, steps: int, count: int) -> None:
    schedule = Schedule(dense_steps=dense_steps, dense_layers=0)
    assert schedule.dense_step_count(steps) == count
    assert [schedule.is_dense(i, steps, 3) for i in range(steps)] == [i < count for i in range(steps)]


@pytest.mark.parametrize(
    ("dense_layers", "dense"),
    [(0, set()), (1, {0}), (2, {0, 1}), ({1, 3}, {1, 3}), ([2], {2}), (range(1, 3), {1, 2}), ((), set())],
)
def test_named_layers_are_dense_at_every_step(dense_layers: Any, dense: set[int]) -> None:
    schedule = Schedule(dense_steps=0, dense_layers=dense_layers)
    assert {layer for layer in range(4) if schedule.is_dense(49, 50, layer)} == dense


def test_default_is_the_published_warm_up() -> None:
    schedule = Schedule()
    calls = [(step, layer) for step in range(50) for layer in range(3)]
    dense = {(step, layer) for step, layer in calls if schedule.is_dense(step, 50, layer)}
    assert dense == {(step, layer) for step, layer in calls if step < 12 or layer == 0}


BUDGETS: dict[str, Any] = {
    "step_budget": ((0.0, 2.0), (10, 1.5), (0.5, 1)),
    "layer_budget": {3: 0.5, 1: 2},
    "head_budget": {1: [1, 0.5, 2.0]},
}


def test_schedule_is_a_value() -> None:
    layers, of_heads = [1, 2], {1: [1.0, 0.5]}
    schedule = Schedule(dense_layers=layers, head_budget=of_heads)
    layers.append(3)
    of_heads[1].append(3.0)
    of_heads[2] = [1.0]
    assert schedule == Schedule(dense_layers={2, 1}, head_budget={1: (1, 0.5)})
    assert hash(schedule) == hash(Schedule(dense_layers=(1, 2), head_budget={"1": [1.0, 0.5]}))  # type: ignore[dict-item]
    assert Schedule(layer_budget={1: 2, 0: 3}) == Schedule(layer_budget={0: 3, 1: 2})


def test_one_step_is_not_all_of_them() -> None:
    assert Schedule(dense_steps=1) != Schedule(dense_steps=1.0)
    assert Schedule(step_budget=[(0, 2.0)]) != Schedule(step_budget=[(0.0, 2.0)])


@pytest.mark.parametrize("layers", [2, [0, 3], []])
@pytest.mark.parametrize("budgets", [{}, BUDGETS, {"layer_budget": {0: 0.5}}])
def test_settings_rebuild_the_schedule_after_json(layers: Any, budgets: dict[str, Any]) -> None:
    schedule = Schedule(dense_steps=0.5, dense_layers=layers, **budgets)
    plain = schedule.settings()
    again = json.loads(json.dumps(plain))
    assert again == plain and set(plain) == {"dense_steps", "dense_layers", *budgets}
    assert Schedule(**again) == schedule and hash(Schedule(**again)) == hash(schedule)
    assert replace(schedule, dense_steps=0.5) == schedule
    assert schedule.has_budgets is bool(budgets)


def test_heads_of_layers_that_are_not_named_are_alike() -> None:
    schedule = Schedule(**BUDGETS)
    assert schedule.head_factors(1) == (1.0, 0.5, 2.0) and schedule.head_factors(0) is None


@st.composite
def budgets_by_step(draw: st.DrawFn) -> list[tuple[int | Fraction, float]]:
    """Rising numbers and rising fractions, put together in any order that leaves both rising."""
    factors = st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0])
    numbers: list[Any] = sorted(draw(st.sets(st.integers(0, 25), max_size=3)))
    parts: list[Any] = sorted(draw(st.sets(st.integers(0, 19), max_size=3)))
    starts: list[int | Fraction] = []
    while numbers or parts:
        from_numbers = bool(numbers) and (not parts or draw(st.booleans()))
        starts.append(numbers.pop(0) if from_numbers else Fraction(parts.pop(0), 20))
    return [(start, draw(factors)) for start in starts]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(budgets_by_step(), st.dictionaries(st.integers(0, 4), st.sampled_from([0.3, 1.0, 2.0])), st.integers(1, 30))
def test_factors_are_those_of_a_walk_through_the_steps(
    by_step: list[tuple[int | Fraction, float]], by_layer: dict[int, float], steps: int
) -> None:
    given_starts = [(float(start) if isinstance(start, Fraction) else start, factor) for start, factor in by_step]
    schedule = Schedule(step_budget=given_starts, layer_budget=by_layer)
    current = 1.0
    for step in range(steps):
        for start, factor in by_step:
            first = math.ceil(start * steps) if isinstance(start, Fraction) else start
            if first == step:
                current = factor
        for layer in range(6):
            assert schedule.factor(step, steps, layer) == current * by_layer.get(layer, 1.0)


def test_steps_that_are_counted_need_no_number_of_steps() -> None:
    schedule = Schedule(step_budget=[(2, 3.0)])
    assert [schedule.factor(step, None, 0) for step in range(4)] == [1, 1, 3, 3]
    with pytest.raises(ValueError, match=r"step_budget=0.5 is a fraction.*Give an int"):
        Schedule(step_budget=[(0.5, 3.0)]).factor(0, None, 0)
    with pytest.raises(ValueError, match="step must lie in"):
        schedule.factor(4, 4, 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dense_steps": -1}, ValueError, "dense_steps must not be negative"),
        ({"dense_steps": 1.5}, ValueError, "between 0 and 1"),
        ({"dense_steps": float("nan")}, ValueError, "between 0 and 1"),
        ({"dense_steps": True}, TypeError, "dense_steps must be an int"),
        ({"dense_steps": "12"}, TypeError, "dense_steps must be an int"),
        ({"dense_layers": -1}, ValueError, "dense_layers must not be negative"),
        ({"dense_layers": 1.0}, TypeError, "dense_layers must be an int"),
        ({"dense_layers": [0, -2]}, ValueError, "layer index in dense_layers must not be negative"),
        ({"dense_layers": "12"}, TypeError, "layer index in dense_layers must be an int"),
        ({"step_budget": 2.0}, TypeError, r"list of pairs \(start, factor\)"),
        ({"step_budget": {0: 2.0}}, TypeError, r"list of pairs \(start, factor\)"),
        ({"step_budget": [0.5]}, ValueError, r"pairs \(start, factor\).*got 0.5"),
        ({"step_budget": [(0.5, 1.0, 2.0)]}, ValueError, r"pairs \(start, factor\)"),
        ({"step_budget": [(0.5, 1.0), (0.25, 2.0)]}, ValueError, r"must rise, got \[0.5, 0.25\]"),
        ({"step_budget": [(5, 1.0), (0.25, 2.0), (5, 2.0)]}, ValueError, r"must rise, got \[5, 5\]"),
        ({"step_budget": [(1.0, 2.0)]}, ValueError, r"after the last step. Use a fraction in \[0, 1\)"),
        ({"step_budget": [(-1, 2.0)]}, ValueError, "a start in step_budget must not be negative"),
        ({"step_budget": [(1.5, 2.0)]}, ValueError, "a start in step_budget as a fraction.*between 0 and 1"),
        ({"step_budget": [("1", 2.0)]}, TypeError, "a start in step_budget must be an int"),
        ({"step_budget": [(0, 0.0)]}, ValueError, "a factor in step_budget must be a positive number"),
        ({"layer_budget": {0: -1}}, ValueError, "a factor in layer_budget must be a positive number"),
        ({"layer_budget": {0: math.inf}}, ValueError, "positive number, got inf"),
        ({"layer_budget": {0: True}}, TypeError, "a factor in layer_budget must be a number"),
        ({"layer_budget": {-1: 1}}, ValueError, "layer index in layer_budget must not be negative"),
        ({"layer_budget": {"first": 1}}, TypeError, "layer index in layer_budget must be an int, got 'first'"),
        ({"layer_budget": {"1": 1, 1: 2}}, ValueError, "names layer 1 twice"),
        ({"layer_budget": [0.5, 1.0]}, TypeError, "map layers to factors"),
        ({"layer_budget": 0.5}, TypeError, "map layers to factors"),
        ({"head_budget": {0: 0.5}}, TypeError, "one factor for each head of layer 0"),
        ({"head_budget": {0: []}}, TypeError, "one factor for each head of layer 0"),
        ({"head_budget": {0: [1, math.nan]}}, ValueError, "a factor in head_budget must be a positive number"),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule(**options)


@pytest.mark.parametrize(
    ("place", "message"), [((50, 50, 0), "step must"), ((-1, 50, 0), "step must"), ((0, 50, -1), "layer")]
)
def test_places_outside_the_run_are_refused(place: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule().is_dense(*place)


def test_unknown_number_of_steps() -> None:
    counted = Schedule(dense_steps=2, dense_layers=0)
    assert [counted.is_dense(step, None, 0) for step in range(4)] == [True, True, False, False]
    with pytest.raises(ValueError, match="dense_steps"):
        Schedule(dense_steps=0.5).is_dense(0, None, 0)
