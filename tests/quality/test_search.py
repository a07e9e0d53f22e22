"""Shortest paths against all masks there are, and thresholds against all that could be tried."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.quality.search import Rules, best_schedules, bisect_threshold, next_threshold


def cost_table(steps: int, depth: int, seed: int) -> dict[tuple[tuple[int, ...], int], float]:
    """Any cost whatever for any history: real costs are one case of it."""
    rng = random.Random(seed)
    histories = [h for k in range(1, depth + 1) for h in itertools.combinations(range(steps), k)]
    return {(h[::-1], s): rng.choice([0.0, 1.0, rng.random()]) for h in histories for s in range(h[-1] + 1, steps)}


def costs_of(
    mask: tuple[bool, ...], table: dict[tuple[tuple[int, ...], int], float], rules: Rules
) -> list[float] | None:
    """Step by step, as the definition says; None if the rules forbid the mask."""
    history: list[int] = []
    costs, gap = [], 0
    for step, computed in enumerate(mask):
        if not computed and (step == 0 or step in rules.forced or step in rules.fresh):
            return None
        gap = 0 if computed else gap + 1
        if gap >= rules.max_gap:
            return None
        if not computed:
            costs.append(table[tuple(history), step])
        elif step in rules.fresh:
            history = [step]
        else:
            history = [step, *history][: rules.depth]
    return costs


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    steps=st.integers(1, 9),
    depth=st.integers(1, 2),
    gap=st.integers(1, 9),
    seed=st.integers(0, 999),
    forced=st.frozensets(st.integers(0, 8), max_size=2),
    fresh=st.frozensets(st.integers(1, 8), max_size=1),
    objective=st.sampled_from(["sum", "worst"]),
)
def test_every_budget_gets_the_best_of_all_masks(steps, depth, gap, seed, forced, fresh, objective) -> None:
    table = cost_table(steps, depth, seed)
    rules = Rules(
        steps, depth, gap, frozenset(s for s in forced if s < steps), frozenset(s for s in fresh if s < steps)
    )
    best: dict[int, tuple[float, ...]] = {}
    for mask in itertools.product([True, False], repeat=steps):
        costs = costs_of(mask, table, rules)
        if costs is not None:
            key = (round(sum(costs), 9),) if objective == "sum" else tuple(sorted(costs, reverse=True))
            best[sum(mask)] = min(best.get(sum(mask), (math.inf,)), key)
    found = best_schedules(lambda history, step: table[history, step], rules, objective)
    assert set(found) == set(best)
    for budget, schedule in found.items():
        mask = tuple(step in schedule.computed for step in range(steps))
        costs = costs_of(mask, table, rules)
        assert costs is not None and sum(mask) == budget
        if objective == "sum":
            assert schedule.cost == pytest.approx(sum(costs)) == pytest.approx(best[budget][0])
        else:
            assert tuple(sorted(costs, reverse=True)) == best[budget]
            assert schedule.cost == max(costs, default=0.0)


def test_twelve_steps_with_two_computed_values() -> None:
    table = cost_table(12, 2, 5)
    rules = Rules(12, 2, 12)
    found = best_schedules(lambda history, step: table[history, step], rules)
    for budget in (3, 6):
        masks = (
            tuple(s in (0, *rest) for s in range(12)) for rest in itertools.combinations(range(1, 12), budget - 1)
        )
        costs = [costs_of(mask, table, rules) for mask in masks]
        assert found[budget].cost == pytest.approx(min(sum(c) for c in costs if c is not None))


def test_even_costs_give_even_schedules() -> None:
    found = best_schedules(lambda history, step: float(step - history[0]), Rules(12, max_gap=12))
    assert found[4].computed == (0, 3, 6, 9) and found[4].cost == 4 * (1 + 2)
    assert found[12].cost == 0 and found[1].computed == (0,)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="'mean'"):
        best_schedules(lambda history, step: 0.0, Rules(3), "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count from 1"):
        Rules(0)


@dataclass(frozen=True)
class Toy:
    """A policy that adds up changes and computes once they reach the threshold, as TeaCache and EasyCache do."""

    computed: tuple[bool, ...]
    distances: tuple[float, ...]


def toy(changes: list[float], threshold: float) -> Toy:
    total, computed, distances = 0.0, [True], []
    for change in changes:
        total += change
        computes = total >= threshold
        computed.append(computes)
        if computes:
            distances.append(total)
            total = 0.0
    return Toy(tuple(computed), tuple(distances))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    changes=st.lists(st.integers(1, 10**6).map(lambda n: n / 10**6), min_size=1, max_size=12),
    budget=st.integers(1, 13),
)
def test_bisection_ends_at_two_neighbors_that_decide_otherwise(changes: list[float], budget: int) -> None:
    tried: list[float] = []

    def replay(threshold: float) -> Toy:
        tried.append(threshold)
        return toy(changes, threshold)

    def good(found: Toy) -> bool:
        return sum(found.computed) >= budget

    if budget > len(changes) + 1:
        with pytest.raises(ValueError, match="even at threshold 0"):
            bisect_threshold(replay, good)
        return
    bracket = bisect_threshold(replay, good)
    assert good(bracket.found) and bracket.found == toy(changes, bracket.threshold)
    if bracket.next_threshold is None:
        assert budget == 1 and sum(bracket.found.computed) == 1
    else:
        after = toy(changes, bracket.next_threshold)
        assert not good(after) and after.computed != bracket.found.computed
        middle = (bracket.threshold + bracket.next_threshold) / 2
        if bracket.threshold < middle < bracket.next_threshold:
            assert toy(changes, middle).computed == bracket.found.computed  # reals in between make no difference
    assert len(tried) <= 2 + 2 * math.ceil(math.log2(len(changes) ** 2 + 2)) + len(changes)


def test_the_next_threshold_is_the_first_that_matters() -> None:
    changes = [0.3, 0.2, 0.5, 0.1]
    threshold, seen = 0.0, []
    while True:
        found = toy(changes, threshold)
        seen.append(found.computed)
        following = next_threshold(found)
        if following is None:
            break
        threshold = following
    every = [toy(changes, t / 1000).computed for t in range(0, 1200)]
    assert list(dict.fromkeys(every)) == seen and len(set(seen)) == len(seen)
