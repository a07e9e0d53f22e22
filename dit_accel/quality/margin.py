"""How far above the target the prompts at hand must lie for prompts unseen to meet it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from .target import MOST

_PIECES = 2000  # of Simpson's rule; even


def lower_bound(scores: Sequence[float], coverage: float | None) -> float:
    """What one more prompt will score at least, with a probability of ``coverage``.

    The one-sided prediction bound for a normal sample, ``mean - t * s * sqrt(1 + 1/n)`` with Student's t of n - 1
    degrees of freedom, but never above the lowest score seen. Prompts that are bit-equal to dense are left out of it
    where two others are there: what they reuse is nothing, so they say nothing about the spread of those that reuse,
    and one more of their kind scores better than the bound anyway.

    Args:
        scores: one for each prompt, decibels; :data:`.MOST` for one that is bit-equal to dense.
        coverage: in [0.5, 1); None for the lowest score alone.

    Raises:
        ValueError: if there is no score, or fewer than two where a spread is asked for.
    """
    if not scores:
        raise ValueError("there is no score to bound; measure at least one prompt")
    if coverage is None:
        return min(scores)
    count = len(scores)
    if count < 2:
        raise ValueError("a spread needs at least two prompts; give more prompts, or coverage=None")
    if min(scores) >= MOST:
        return min(scores)
    differing = [score for score in scores if score < MOST]
    if len(differing) > 1:
        scores, count = differing, len(differing)
    mean = sum(scores) / count
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / (count - 1))
    return min(*scores, mean - student_quantile(coverage, count - 1) * spread * math.sqrt(1 + 1 / count))


def shared_coverage(coverage: float | None, caches: int) -> float | None:
    """The coverage that each of several caches needs for the one that is chosen to have it.

    The fastest of many that pass is likely the luckiest one, and does worse on the next prompt than its bound says.
    So the chance of a miss is divided among all that could have been chosen (Bonferroni's correction, which also holds
    where their scores depend on each other, and then is careful).

    Args:
        coverage: that is wanted, in [0.5, 1); None for the lowest score alone.
        caches: how many passed.
    """
    return None if coverage is None else 1 - (1 - coverage) / max(1, caches)


@cache
def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, by bisection on its integrated density.

    Args:
        probability: in [0.5, 1).
        freedom: degrees of freedom, from 1.

    Raises:
        ValueError: outside these ranges.
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"coverage is a probability in [0.5, 1), such as 0.98; got {probability}")
    if freedom < 1:
        raise ValueError(f"degrees of freedom count from 1; got {freedom}")
    # With t = sqrt(f) tan(a) the integral is over cos(a)^(f-1), which ends at a right angle: no infinite tail.
    low, high = 0.0, math.pi / 2
    total = _integral(freedom, high)
    for _ in range(60):
        middle = (low + high) / 2
        if 0.5 + 0.5 * _integral(freedom, middle) / total < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _integral(freedom: int, end: float) -> float:
    """Of cos(a)^(freedom - 1) from 0, by Simpson's rule."""
    width = end / _PIECES
    heights = [max(math.cos(index * width), 0.0) ** (freedom - 1) for index in range(_PIECES + 1)]
    return (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])) * width / 3
