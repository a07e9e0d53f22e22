"""Least squares against all sets of free unknowns; weights against a sampler whose truth is known."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.quality.amplification import fit_weights, hats, nonnegative_least_squares


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=st.integers(1, 6), unknowns=st.integers(1, 5), seed=st.integers(0, 9999))
def test_least_squares_find_the_best_of_all_sets_of_free_unknowns(rows: int, unknowns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, wanted = rng.normal(size=(rows, unknowns)), rng.normal(size=rows)
    best = float(np.linalg.norm(wanted))
    for count in range(1, unknowns + 1):
        for chosen in itertools.combinations(range(unknowns), count):
            part = np.linalg.lstsq(matrix[:, list(chosen)], wanted, rcond=None)[0]
            if (part >= 0).all():
                best = min(best, float(np.linalg.norm(matrix[:, list(chosen)] @ part - wanted)))
    found = nonnegative_least_squares(matrix, wanted)
    assert (found >= 0).all()
    assert np.linalg.norm(matrix @ found - wanted) == pytest.approx(best, abs=1e-9)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        nonnegative_least_squares(np.full((2, 2), np.nan), np.ones(2))
    with pytest.raises(ValueError, match="rows"):
        nonnegative_least_squares(np.ones((2, 2)), np.ones(3))


def test_hats_sum_to_one() -> None:
    for count in (1, 2, 4):
        functions = hats(13, count)
        assert functions.shape == (count, 13) and np.allclose(functions.sum(0), 1) and (functions >= 0).all()


def test_weights_of_a_linear_sampler_are_recovered() -> None:
    """x' = x + d v with v = a x: an error at step s grows by (1 + d a) at every later step."""
    steps, slope = 20, 1.5
    stride = 1 / steps
    truth = np.array([(1 + stride * slope) ** (steps - 1 - s) for s in range(steps)])
    rng = random.Random(3)
    errors, finals = [], []
    for _ in range(12):
        row = [0.0 if rng.random() < 0.4 else 0.01 * rng.random() for _ in range(steps)]
        dense = cached = 1.0
        for error in row:
            dense, cached = dense + stride * slope * dense, cached + stride * slope * cached + error
        errors.append(row)
        finals.append(cached - dense)
    weights = fit_weights(np.array(errors), np.array(finals), knots=4, ridge=1e-6)
    assert weights == pytest.approx(truth, rel=0.1)
    assert weights[0] > 2.5 * weights[-1]
    again = rng.choices([0.0, 0.02], k=steps)
    assert float(np.dot(weights, again)) == pytest.approx(float(np.dot(truth, again)), rel=0.05)


def test_few_runs_stay_near_an_even_weight_and_none_is_zero() -> None:
    errors = np.zeros((1, 10))
    errors[0, 2] = 0.1
    weights = fit_weights(errors, np.array([0.2]), ridge=0.05)
    assert weights.shape == (10,) and (weights > 0).all() and weights[9] == pytest.approx(2.0, rel=0.2)
    with pytest.raises(ValueError, match="differs"):
        fit_weights(np.zeros((2, 4)), np.zeros(2))
