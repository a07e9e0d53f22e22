"""How much an error at one step weighs in the final latents, fitted from real cached runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def nonnegative_least_squares(matrix: Floats, wanted: Floats) -> Floats:
    """The x >= 0 that minimizes ``|matrix x - wanted|`` (Lawson and Hanson 1974, chapter 23).

    Args:
        matrix: ``[rows, unknowns]``.
        wanted: ``[rows]``.

    Returns:
        ``[unknowns]``.

    Raises:
        ValueError: for shapes that do not fit, or values that are not finite.
    """
    if matrix.ndim != 2 or wanted.shape != matrix.shape[:1]:
        raise ValueError(f"least squares need [rows, unknowns] and [rows]; got {matrix.shape} and {wanted.shape}")
    if not (np.isfinite(matrix).all() and np.isfinite(wanted).all()):
        raise ValueError("least squares need finite numbers; a run has given NaN or infinity")
    count = matrix.shape[1]
    found, free = np.zeros(count), np.zeros(count, dtype=bool)
    tolerance = 1e-10 * max(float(np.abs(matrix.T @ wanted).max(initial=0.0)), 1e-300)
    for _ in range(3 * count + 10):
        slope = matrix.T @ (wanted - matrix @ found)
        if free.all() or slope[~free].max() <= tolerance:
            break
        free[int(np.argmax(np.where(free, -np.inf, slope)))] = True
        found = _solve_free(matrix, wanted, found, free)
    return found


def _solve_free(matrix: Floats, wanted: Floats, found: Floats, free: NDArray[np.bool_]) -> Floats:
    """Least squares over the free unknowns; those that would turn negative are held at 0 instead."""
    while True:
        solved = np.zeros_like(found)
        solved[free] = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
        negative = free & (solved <= 0)
        if not negative.any():
            return solved
        steps = found[negative] / np.maximum(found[negative] - solved[negative], 1e-300)
        found = found + float(steps.min()) * (solved - found)
        free &= ~(negative & (found <= 1e-14 * max(1.0, float(np.abs(found).max()))))
        if not free.any():
            return np.zeros_like(found)


def hats(steps: int, count: int) -> Floats:
    """``[count, steps]``: piecewise linear functions over the steps that sum to 1, each 1 at its own knot."""
    if count == 1:
        return np.ones((1, steps))
    place = np.linspace(0, count - 1, steps)
    return np.maximum(0.0, 1 - np.abs(place[None] - np.arange(count)[:, None]))


def fit_weights(errors: Floats, finals: Floats, knots: int = 4, ridge: float = 0.05) -> Floats:
    """Weights w >= 0 with ``final error ~ sum over steps of w * error``.

    There are fewer runs than steps, so the weights are piecewise linear over the steps and held towards an even
    weight. Every run counts by its relative misfit, because final errors differ by orders of magnitude.

    Args:
        errors: ``[runs, steps]``, teacher-forced errors of each step, 0 where it was computed.
        finals: ``[runs]``, the errors of their final latents.
        knots: of the weights, from 1.
        ridge: how strongly they are held; 0 for not at all.

    Returns:
        ``[steps]``; none is 0, since a step without weight would be skipped for nothing.

    Raises:
        ValueError: if no run has an error to learn from.
    """
    totals = errors.sum(1)
    useful = (totals > 0) & (finals > 0)
    if not useful.any():
        raise ValueError("amplification needs a cached run that differs from the dense one; none does")
    errors, finals, totals = errors[useful], finals[useful], totals[useful]
    even = float(np.exp(np.mean(np.log(finals / totals))))
    basis = hats(errors.shape[1], min(knots, errors.shape[1]))
    matrix = even * (errors @ basis.T) / finals[:, None]
    held = np.sqrt(ridge) * np.eye(len(basis))
    wanted = np.concatenate([np.ones(len(finals)), np.full(len(basis), np.sqrt(ridge))])
    factors = nonnegative_least_squares(np.concatenate([matrix, held]), wanted)
    weights: Floats = even * np.maximum(basis.T @ factors, 1e-3)
    return weights
