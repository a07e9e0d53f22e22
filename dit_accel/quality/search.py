"""Offline search: schedules as shortest paths, and thresholds among distances that were observed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

History = tuple[int, ...]
"""The latest computed steps, newest first."""
Cost = Callable[[History, int], float]
"""The cost of predicting a step from the computed ones."""
Objective = Literal["sum", "worst"]


@dataclass(frozen=True)
class Schedule:
    """Which steps of a generation are computed.

    Attributes:
        computed: their indices, rising.
        cost: the sum of the costs of all others, or the highest of them, as the objective says.
    """

    computed: tuple[int, ...]
    cost: float


@dataclass(frozen=True)
class Rules:
    """What every schedule keeps to.

    Attributes:
        steps: number of steps.
        depth: how many computed steps a prediction looks at.
        max_gap: most steps from one computed step to the next.
        forced: steps that are computed in any case; the first always is.
        fresh: steps at which the history starts anew, such as the first of another expert; they are forced too.
    """

    steps: int
    depth: int = 1
    max_gap: int = 10
    forced: frozenset[int] = frozenset()
    fresh: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.depth < 1 or self.max_gap < 1:
            raise ValueError(f"steps, depth and max_gap count from 1; got {self.steps}, {self.depth}, {self.max_gap}")

    def after(self, history: History, step: int) -> History:
        """The history once a step was computed."""
        return (step,) if step in self.fresh else (step, *history)[: self.depth]

    def gap(self, history: History) -> int:
        """The latest step that may be the next computed one; ``steps`` for the end."""
        first = history[0]
        must = min((s for s in self.forced | self.fresh if s > first), default=self.steps)
        return min(first + self.max_gap, must, self.steps)


@dataclass(frozen=True)
class _Label:
    """A path so far: what it is compared by, and its computed steps."""

    key: Any
    computed: tuple[int, ...]


def best_schedules(cost: Cost, rules: Rules, objective: Objective = "sum") -> dict[int, Schedule]:
    """For every number of computed steps the schedule of least cost: an exact dynamic program.

    A path goes from computed step to computed step; the edge from i to j predicts the steps between them. Its state
    holds as many computed steps as a prediction looks at, so the cost of an edge depends on nothing else. With
    ``"worst"``, schedules are compared by their highest cost, then by the next (LeMiCa, arXiv 2511.00090, compares its
    edges so); adding a cost to both of two lists keeps their order, so that the program stays exact.

    Args:
        cost: of one predicted step, given the latest computed ones; at least 0.
        rules: what may be a schedule.
        objective: ``"sum"`` or ``"worst"``.

    Returns:
        by number of computed steps, those that are possible.

    Raises:
        ValueError: for another objective.
    """
    if objective not in ("sum", "worst"):
        raise ValueError(f'the objective is "sum" or "worst"; got {objective!r}')
    worst = objective == "worst"
    layers: list[dict[History, dict[int, _Label]]] = [{} for _ in range(rules.steps)]
    layers[0][(0,)] = {1: _Label(() if worst else 0.0, (0,))}
    ends: dict[int, _Label] = {}
    for step, layer in enumerate(layers):
        for history, labels in layer.items():
            added: tuple[float, ...] = ()
            for following in range(step + 1, rules.gap(history) + 1):
                if following > step + 1:
                    added = (*added, cost(history, following - 1))
                for count, label in labels.items():
                    key = _extended(label.key, added, worst)
                    if following == rules.steps:
                        _improve(ends, count, _Label(key, label.computed))
                    else:
                        there = layers[following].setdefault(rules.after(history, following), {})
                        _improve(there, count + 1, _Label(key, (*label.computed, following)))
    return {count: Schedule(label.computed, _total(label.key)) for count, label in sorted(ends.items())}


def _extended(key: Any, added: tuple[float, ...], worst: bool) -> Any:
    return tuple(sorted((*key, *added), reverse=True)) if worst else key + sum(added)


def _total(key: Any) -> float:
    return float(max(key, default=0.0) if isinstance(key, tuple) else key)


def _improve(best: dict[int, _Label], count: int, label: _Label) -> None:
    if count not in best or label.key < best[count].key:
        best[count] = label


class Observed(Protocol):
    """What a policy did at one threshold.

    Attributes:
        distances: the numbers it compared with the threshold at steps that it computed.
    """

    @property
    def distances(self) -> Collection[float]:
        """See above."""


Found = TypeVar("Found", bound=Observed)


@dataclass(frozen=True)
class Bracket(Generic[Found]):
    """Two neighboring settings: between their thresholds no decision changes but at one point.

    Attributes:
        threshold: the higher of those that are good.
        found: what the policy does there.
        next_threshold: the least one with another decision; None if there is none.
    """

    threshold: float
    found: Found
    next_threshold: float | None


def next_threshold(found: Observed) -> float | None:
    """The least threshold above the present one that changes a decision; None if nothing can.

    As long as the threshold stays below every distance at which the policy computed, it decides as it did, step by
    step. Just above the lowest of them one decision turns, whether the policy compares by < or by <=.
    """
    least = min((distance for distance in found.distances if math.isfinite(distance)), default=None)
    return None if least is None else math.nextafter(least, math.inf)


def bisect_threshold(replay: Callable[[float], Found], good: Callable[[Found], bool]) -> Bracket[Found]:
    """The highest threshold that is good, by bisection over the sorted distances that were observed.

    Reals between two of them make no difference, so they are not tried; the search ends at two neighbors, one good,
    one not, whose decisions differ.

    Args:
        replay: runs the policy at a threshold.
        good: whether what it did will do; taken to fail from some threshold on.

    Returns:
        the highest good threshold found, and the next one that decides otherwise.

    Raises:
        ValueError: if even threshold 0 is not good.
    """
    low, found = 0.0, replay(0.0)
    if not good(found):
        raise ValueError("the policy fails even at threshold 0; compute more steps by its limits")
    seen = set(found.distances)
    high: float | None = None
    while True:
        step = next_threshold(found)
        if step is None or (high is not None and step >= high):
            return Bracket(low, found, high if step is not None else None)
        turns = {step, *(math.nextafter(distance, math.inf) for distance in seen if math.isfinite(distance))}
        within = sorted(turn for turn in turns if turn >= step and (high is None or turn < high))
        middle = within[len(within) // 2]
        tried = replay(middle)
        seen |= set(tried.distances)
        if good(tried):
            low, found = middle, tried
        else:
            high = middle
