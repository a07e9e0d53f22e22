"""Settings at which a method keeps a given part of all pairs: the one search for them, and what is turned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..controls import AttentionCall
from ..kernels.sparse_plan import SparsePlan
from ..processors import DynamicAttnProcessor, SparseAttnProcessor, StaticAttnProcessor

Options = dict[str, Any]
TOLERANCE = 0.1  # relative difference from the wanted density that counts as equal
NEAR_ENOUGH = 0.01  # at which a knob is turned no further
TURNS = 14  # of a knob at most


class Knob(NamedTuple):
    """A setting that makes plans denser as it grows.

    Attributes:
        name: of the setting.
        low: least value that is tried, above 0.
        high: greatest.
        fixed: settings that go with it.
    """

    name: str
    low: float
    high: float
    fixed: Options = {}  # noqa: RUF012, never changed

    def turned(self, value: float) -> Options:
        """The settings for a value."""
        return self.fixed | {self.name: value}


DENSITY, AMOUNT, WINDOW = (Knob(name, 0.005, 1.0) for name in ("density", "amount", "window"))
DECAY = Knob("decay", 0.001, 16.0)
OTHER_KNOBS = {"radial": DECAY, "neighborhood": WINDOW, "block_routing": AMOUNT, "vmoba": AMOUNT}
"""By method; those that are not named take a density."""


def knob_of(method: str) -> Knob:
    """What says how much a method keeps."""
    return OTHER_KNOBS.get(method, DENSITY)


def tune(
    density_of: Callable[[Options], float | None],
    knobs: Sequence[Knob],
    target: float,
    near: float = NEAR_ENOUGH,
    turns: int = TURNS,
) -> tuple[Options, float]:
    """Settings whose density comes nearest to a target.

    Args:
        density_of: density for settings, greater as a knob is turned up; None if nothing is sparse.
        knobs: the next one is tried where those before do not come within ``TOLERANCE``.
        target: density, in (0, 1].
        near: relative difference of densities at which a knob is turned no further.
        turns: of a knob at most.

    Returns:
        the settings, and their density.

    Raises:
        ValueError: if nothing is sparse.
    """
    tried: list[tuple[float, float, Options]] = []
    for knob in knobs:
        tried += _turn(knob, density_of, target, near, turns)
        if min(tried, key=_distance)[0] <= TOLERANCE:
            break
    _, density, options = min(tried, key=_distance)
    return options, density


def _turn(
    knob: Knob, density_of: Callable[[Options], float | None], target: float, near: float, turns: int
) -> Iterator[tuple[float, float, Options]]:
    """Bisects the knob on a logarithmic scale, from the target itself: many a knob is the density."""
    low, high, value = knob.low, knob.high, min(max(target, knob.low), knob.high)
    for _ in range(turns):
        options = knob.turned(value)
        density = density_of(options)
        if density is None:
            raise ValueError("no call is sparse, so there is no density; take more steps")
        yield abs(density / target - 1), density, options
        if abs(density / target - 1) <= near or high / low < 1 + near / 10:
            return
        low, high = (value, high) if density < target else (low, value)
        value = math.sqrt(low * high)


def _distance(one: tuple[float, float, Options]) -> float:
    return one[0]


def plan_of(recipe: SparseAttnProcessor, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> SparsePlan:
    """The plan of a static or dynamic recipe for one call, as its site would have it at a first search.

    Args:
        recipe: the method.
        call: where and when.
        query: ``[batch, heads, tokens, head_dim]``.
        key: likewise.
        value: likewise.

    Raises:
        ValueError: if the recipe has no plans, or cannot work with the layout.
    """
    if isinstance(recipe, StaticAttnProcessor):
        return recipe.for_step(call.site, call.state).build_plan(call.layout, query.device)
    if not isinstance(recipe, DynamicAttnProcessor):
        raise ValueError(f"{type(recipe).__name__} has no plan, so no density to tune")
    setup = recipe.at_step(recipe.set_up(call.site, call.layout, query.device), call.site, call.state)
    return recipe.search_with_values(query, key, value, setup, None, scale=None)[0]
