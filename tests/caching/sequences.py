"""Random sequences and a plain engine, for tests of policies."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

from dit_accel.caching.policies import Judge, Sight
from dit_accel.caching.unit import Unit

STEPS = 24
UNIT = Unit("blocks 1-3", "blocks", 1, 3)
Vectors = list[list[float]]
RANDOM = settings(max_examples=50, deadline=None, derandomize=True)


def walk(seed: int, steps: int, size: int = 7, pace: float = 0.2) -> Vectors:
    """A sequence of vectors that change at a pace that varies from step to step."""
    draw = random.Random(seed)
    vector = [draw.uniform(0.5, 2.0) for _ in range(size)]
    found = []
    for _ in range(steps):
        found.append(list(vector))
        stride = draw.choice((0.1, 1.0, 3.0)) * pace
        vector = [value + stride * draw.uniform(-1.0, 1.0) for value in vector]
    return found


def mean_difference(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def rel(a: Sequence[float], b: Sequence[float]) -> float:
    return mean_difference(a, b) / (sum(abs(y) for y in b) / len(b))


def tensors(vectors: Vectors) -> list[Tensor]:
    return [torch.tensor(vector, dtype=torch.float64).reshape(1, -1, 1) for vector in vectors]


def sights(steps: int, **sequences: Sequence[Any]) -> list[Sight]:
    """What the engine would show; keyword arguments are sequences of fields of :class:`Sight`."""
    plain = Sight(0, steps, "cond", "transformer", UNIT, None, None, torch.zeros(1, 1, 1), None, None)
    return [
        replace(plain, step=step, **{name: values[step] for name, values in sequences.items()})
        for step in range(steps)
    ]


def decisions(
    judge: Judge, seen: Sequence[Sight], forced: frozenset[int], outputs: Sequence[Tensor] | None = None
) -> list[bool]:
    """Whether each step is computed; the first one and the forced ones are, and nobody is asked."""
    found = []
    for sight in seen:
        computes = sight.step == 0 or sight.step in forced or judge.wants_compute(sight)
        judge.note(sight, computes, outputs[sight.step] if outputs is not None else None)
        found.append(computes)
    return found


def forced_steps(seed: int, steps: int) -> frozenset[int]:
    draw = random.Random(seed + 1)
    return frozenset(draw.sample(range(steps), steps // 8))


def sums_up(steps: int, forced: frozenset[int], threshold: float, change: Callable[[int, int], float]) -> list[bool]:
    """A rule that sums ``change(step, latest computed step)`` and starts anew where it computes."""
    found, total, latest = [], 0.0, 0
    for step in range(steps):
        if step == 0 or step in forced:
            computes = True
        else:
            total += change(step, latest)
            computes = total >= threshold
        if computes:
            total, latest = 0.0, step
        found.append(computes)
    return found
