"""Dense warm-up: which steps and layers."""

from __future__ import annotations

from typing import Any

import pytest

from dit_accel.plan import PlanPolicy


@pytest.mark.parametrize(
    ("dense_steps", "num_steps", "count"),
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
def test_first_steps_are_dense(dense_steps: float, num_steps: int, count: int) -> None:
    policy = PlanPolicy(dense_steps=dense_steps, dense_layers=0)
    assert policy.dense_step_count(num_steps) == count
    assert [policy.is_dense(i, num_steps, 3) for i in range(num_steps)] == [i < count for i in range(num_steps)]


@pytest.mark.parametrize(
    ("dense_layers", "dense"),
    [(0, set()), (1, {0}), (2, {0, 1}), ({1, 3}, {1, 3}), ([2], {2}), (range(1, 3), {1, 2}), ((), set())],
)
def test_named_layers_are_dense_at_every_step(dense_layers: Any, dense: set[int]) -> None:
    policy = PlanPolicy(dense_steps=0, dense_layers=dense_layers)
    assert {layer for layer in range(4) if policy.is_dense(49, 50, layer)} == dense


def test_default_is_the_published_warm_up() -> None:
    policy = PlanPolicy()
    calls = [(step, layer) for step in range(50) for layer in range(3)]
    dense = {(step, layer) for step, layer in calls if policy.is_dense(step, 50, layer)}
    assert dense == {(step, layer) for step, layer in calls if step < 12 or layer == 0}


def test_policy_is_a_value() -> None:
    layers = [1, 2]
    policy = PlanPolicy(dense_layers=layers)
    layers.append(3)
    assert policy == PlanPolicy(dense_layers={2, 1})
    assert hash(policy) == hash(PlanPolicy(dense_layers=(1, 2)))


@pytest.mark.parametrize("layers", [2, [0, 3], []])
def test_settings_rebuild_the_policy(layers: Any) -> None:
    policy = PlanPolicy(dense_steps=0.5, dense_layers=layers)
    assert policy.settings() == {"dense_steps": 0.5, "dense_layers": layers}
    assert PlanPolicy(**policy.settings()) == policy


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
    ],
)
def test_bad_policies_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PlanPolicy(**options)


@pytest.mark.parametrize(
    ("place", "message"), [((50, 50, 0), "step_index"), ((-1, 50, 0), "step_index"), ((0, 50, -1), "layer")]
)
def test_places_outside_the_run_are_refused(place: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanPolicy().is_dense(*place)


def test_unknown_number_of_steps() -> None:
    counted = PlanPolicy(dense_steps=2, dense_layers=0)
    assert [counted.is_dense(step, None, 0) for step in range(4)] == [True, True, False, False]
    with pytest.raises(ValueError, match="dense_steps"):
        PlanPolicy(dense_steps=0.5).is_dense(0, None, 0)
