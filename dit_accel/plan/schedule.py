"""When a method runs dense although it has a plan, and how its budget changes with step, layer and head."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

# What a caller may give, and the sorted pairs that are kept of it.
ByStep = Sequence[Sequence[int | float]]
ByLayer = Mapping[int, float] | tuple[tuple[int, float], ...]
ByHead = Mapping[int, Sequence[float]] | tuple[tuple[int, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Schedule:
    """Which steps and layers stay dense, and how much the others keep.

    The first steps fix the layout of the video, and some layers spread their attention wide.  The defaults are those
    published for Wan 2.1 (Radial Attention, arXiv 2506.19852): 12 of 50 steps and the first layer.  The steps are
    given as a fraction, because a shorter run wants fewer dense ones.

    Budgets are factors on what the method itself would keep, such as its density: at a step, in a layer, for a head.
    They are multiplied; what comes out is at most everything and at least one block.  1 is the method's own budget.

    Attributes:
        dense_steps: First steps of a generation that stay dense.  An int counts steps, a float between 0 and 1 is a
            fraction of all steps, rounded up (so 1 is one step and 1.0 is all of them).
        dense_layers: Layers that stay dense at every step.  An int means the first so many, a collection lists
            layer indices.
        step_budget: Pairs (start, factor): from a step on, until the next start.  An int counts steps from 0, a float
            in [0, 1) is a fraction of all steps, dense ones included, rounded up.  Before the first start it is 1.
        layer_budget: Factor by layer; 1 for layers that are not named.
        head_budget: One factor for each head, by layer; 1 for layers that are not named.

    Raises:
        ValueError: Numbers outside these ranges, factors that are not positive, or starts that do not rise.
        TypeError: Anything but numbers where numbers are meant.
    """

    dense_steps: int | float = 0.24
    dense_layers: int | Collection[int] = 1
    step_budget: ByStep = ()
    layer_budget: ByLayer = ()
    head_budget: ByHead = ()
    # 1 == 1.0, but one step is not all of them: which starts are fractions is part of the value.
    _fractions: tuple[bool, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Frozen, so that a schedule can be part of a key and a list given by the caller cannot change it later.
        _check_start("dense_steps", self.dense_steps)
        if isinstance(self.dense_layers, Collection):
            layers = frozenset(self.dense_layers)
            for layer in layers:
                _check_count("a layer index in dense_layers", layer)
            object.__setattr__(self, "dense_layers", layers)
        else:
            _check_count("dense_layers", self.dense_layers)
        steps = _step_pairs(self.step_budget)
        heads = {layer: _head_factors(layer, row) for layer, row in _by_layer("head_budget", self.head_budget)}
        all_heads = {layer: _factor("layer_budget", f) for layer, f in _by_layer("layer_budget", self.layer_budget)}
        object.__setattr__(self, "step_budget", steps)
        object.__setattr__(self, "layer_budget", tuple(sorted(all_heads.items())))
        object.__setattr__(self, "head_budget", tuple(sorted(heads.items())))
        starts = (self.dense_steps, *(start for start, _ in steps))
        object.__setattr__(self, "_fractions", tuple(isinstance(start, float) for start in starts))

    @property
    def has_budgets(self) -> bool:
        """Whether any budget differs between steps, layers or heads, or may."""
        return bool(self.step_budget or self.layer_budget or self.head_budget)

    def dense_step_count(self, steps: int | None) -> int:
        """Gives the number of dense steps out of `steps`, which may be unknown (None) if a number was given.

        Raises:
            ValueError: `dense_steps` is a fraction of an unknown number.
        """
        count = step_index("dense_steps", self.dense_steps, steps)
        return count if steps is None else min(steps, count)

    def is_dense(self, step: int, steps: int | None, layer: int) -> bool:
        """Tells whether a layer stays dense at a step.

        Args:
            step: Step of the generation, from 0.
            steps: Steps of the generation, None if unknown.
            layer: Index of the transformer block, from 0.

        Raises:
            ValueError: The step is not one of `steps`, the layer is negative, or a fraction of an unknown number of
                steps is asked for.
        """
        _check_place(step, steps, layer)
        dense = self.dense_layers
        is_dense_layer = layer in dense if isinstance(dense, Collection) else layer < dense
        return step < self.dense_step_count(steps) or is_dense_layer

    def factor(self, step: int, steps: int | None, layer: int) -> float:
        """Gives the factor on the budget of a layer at a step; heads have theirs besides, see `head_factors`.

        Args:
            step: As for `is_dense`.
            steps: Likewise.
            layer: Likewise.

        Raises:
            ValueError: As `is_dense`.
        """
        _check_place(step, steps, layer)
        # Fractions and numbers may be mixed, so their order is known only now; of equal ones the later counts.
        starts = [step_index("step_budget", start, steps) for start, _ in self.step_budget]
        reached = [(start, place) for place, start in enumerate(starts) if start <= step]
        of_step = self.step_budget[max(reached)[1]][1] if reached else 1.0
        return of_step * dict(self.layer_budget).get(layer, 1.0)

    def head_factors(self, layer: int) -> tuple[float, ...] | None:
        """Gives the factors of a layer's heads, None if they are all 1 because nothing was said."""
        found = dict(self.head_budget).get(layer)
        return None if found is None else tuple(found)

    def settings(self) -> dict[str, Any]:
        """Gives the arguments that build an equal schedule, as plain values; budgets only where there are some."""
        layers = self.dense_layers
        plain: dict[str, Any] = {
            "dense_steps": self.dense_steps,
            "dense_layers": sorted(layers) if isinstance(layers, Collection) else layers,
        }
        if self.step_budget:
            plain["step_budget"] = [list(pair) for pair in self.step_budget]
        if self.layer_budget:
            plain["layer_budget"] = {str(layer): factor for layer, factor in dict(self.layer_budget).items()}
        if self.head_budget:
            plain["head_budget"] = {str(layer): list(row) for layer, row in dict(self.head_budget).items()}
        return plain


def step_index(name: str, start: int | float, steps: int | None) -> int:
    """Gives the step, from 0, that a start means: an int itself, a float as a fraction of all steps, rounded up.

    Args:
        name: Of the setting, for the error.
        start: A step or a fraction.
        steps: Steps of the generation, None if unknown.

    Raises:
        ValueError: A fraction of an unknown number.
    """
    if not isinstance(start, float):
        return start
    if steps is None:
        raise ValueError(
            f"{name}={start} is a fraction, and nobody says how many steps there are. Give an int, or call "
            "clock.set_step(step, steps) before each call of the model."
        )
    # The slack keeps a fraction such as 0.07 of 100 from becoming 8 by rounding error.
    return math.ceil(start * steps - 1e-9)


def _step_pairs(budget: Any) -> tuple[tuple[int | float, float], ...]:
    if isinstance(budget, (str, Mapping)) or not isinstance(budget, Sequence):
        raise TypeError(f"step_budget must be a list of pairs (start, factor), such as [(0.0, 2.0)], got {budget!r}.")
    pairs: list[tuple[int | float, float]] = []
    for pair in budget:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"step_budget holds pairs (start, factor), such as (0.5, 1.0), got {pair!r}.")
        _check_start("a start in step_budget", pair[0])
        if isinstance(pair[0], float) and pair[0] == 1:
            raise ValueError("a start of 1.0 in step_budget comes after the last step. Use a fraction in [0, 1).")
        pairs.append((pair[0], _factor("step_budget", pair[1])))
    for kind in (int, float):
        starts = [start for start, _ in pairs if isinstance(start, kind)]
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(f"the starts in step_budget must rise, got {starts}.")
    return tuple(pairs)


def _by_layer(name: str, budget: Any) -> list[tuple[int, Any]]:
    """Layer and value; JSON has no integers for keys, so strings of digits are layers, too."""
    pairs = tuple(budget.items()) if isinstance(budget, Mapping) else budget
    if not isinstance(pairs, tuple) or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise TypeError(f"{name} must map layers to factors, such as {{3: 0.5}}, got {budget!r}.")
    found: dict[int, Any] = {}
    for key, value in pairs:
        layer = int(key) if isinstance(key, str) and key.isdecimal() else key
        _check_count(f"a layer index in {name}", layer)
        if layer in found:
            raise ValueError(f"{name} names layer {layer} twice.")
        found[layer] = value
    return list(found.items())


def _head_factors(layer: int, row: Any) -> tuple[float, ...]:
    if isinstance(row, str) or not isinstance(row, Sequence) or not row:
        raise TypeError(f"head_budget must list one factor for each head of layer {layer}, got {row!r}.")
    return tuple(_factor("head_budget", factor) for factor in row)


def _factor(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a factor in {name} must be a number, got {value!r}.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a factor in {name} must be a positive number, got {value}. 1 changes nothing.")
    return float(value)


def _check_place(step: int, steps: int | None, layer: int) -> None:
    if step < 0 or (steps is not None and step >= steps):
        raise ValueError(f"step must lie in 0 to steps - 1 (steps is {steps}), got {step}.")
    if layer < 0:
        raise ValueError(f"layer must not be negative, got {layer}. Count blocks from 0.")


def _check_start(name: str, value: object) -> None:
    if not isinstance(value, float):
        _check_count(name, value)
    elif not 0 <= value <= 1:
        raise ValueError(f"{name} as a fraction must lie between 0 and 1, got {value}. Use an int to count steps.")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}. Use 0 for none.")
