"""Policies that follow a list of steps; they look at nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..unit import Unit
from .base import Judge, Policy, Sight
from .measure import check_count


class StaticJudge(Judge):
    """Computes the steps for which a function of the step's index says so."""

    def __init__(self, computes: Callable[[int], bool]) -> None:
        self._computes = computes

    def wants_compute(self, sight: Sight) -> bool:
        """See :meth:`Judge.wants_compute`."""
        return self._computes(sight.step)

    def note(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """Nothing to remember."""


@dataclass(frozen=True)
class Static(Policy):
    """Computes listed steps and reuses at all others.

    Give either ``compute_steps`` or ``mask``.

    Attributes:
        compute_steps: indices of the steps that are computed.
        mask: for every step whether it is computed (1) or may be reused (0).
        steps: number of sampling steps that the list was made for; with a mask its length. None for any number.

    Raises:
        ValueError: for none or both of them, or indices that are no steps.
    """

    can_tighten = False
    compute_steps: tuple[int, ...] | None = None
    mask: tuple[bool | int, ...] | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.compute_steps is None) == (self.mask is None):
            raise ValueError("Static wants either compute_steps or mask")
        if self.mask is not None:
            if not self.mask or any(entry not in (0, 1) for entry in self.mask):
                raise ValueError(f"a mask has one entry for each step, 1 to compute and 0 to reuse; got {self.mask}")
            if self.steps not in (None, len(self.mask)):
                raise ValueError(f"a mask of {len(self.mask)} entries is not for {self.steps} steps; leave steps out")
            object.__setattr__(self, "steps", len(self.mask))
            object.__setattr__(self, "mask", tuple(map(bool, self.mask)))
            return
        assert self.compute_steps is not None
        if self.steps is not None:
            check_count("steps", self.steps)
        object.__setattr__(self, "compute_steps", tuple(sorted(set(self.compute_steps))))
        for step in self.compute_steps:
            check_count("an index in compute_steps", step, 0)
            if self.steps is not None and step >= self.steps:
                raise ValueError(f"compute_steps are indices from 0 to {self.steps - 1}; got {step}")

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        if self.steps is not None and steps != self.steps:
            told = "nobody says how many steps there are" if steps is None else f"this run has {steps} steps"
            raise ValueError(
                f"the list of steps was made for {self.steps} steps, and {told}; run with {self.steps} steps, or "
                "make a list for the number you run with"
            )
        return StaticJudge(self.computed().__contains__)

    def computed(self) -> frozenset[int]:
        """Indices of the computed steps."""
        if self.mask is not None:
            return frozenset(step for step, computes in enumerate(self.mask) if computes)
        return frozenset(self.compute_steps or ())


@dataclass(frozen=True)
class Interval(Policy):
    """Computes each ``every``-th step (FORA, arXiv 2407.01425; ProfilingDiT's uniform refresh, arXiv 2504.03140).

    Attributes:
        every: distance of computed steps; 1 computes all.
        start: steps before this one are all computed, and it is the first of those counted.
    """

    can_tighten = False
    every: int
    start: int = 0

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_count("start", self.start, 0)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        return StaticJudge(lambda step: step < self.start or (step - self.start) % self.every == 0)


@dataclass(frozen=True)
class Shrinking(Policy):
    """Computes at distances that shrink towards the end (ProfilingDiT, arXiv 2504.03140).

    After a computed step ``s`` of ``N`` the next one follows in ``t_max - (t_max - t_min) (s - start) / (N - start)``
    steps, rounded to a whole number and then down to a multiple. With multiples of 2 this gives the list that the
    paper's code has for 50 steps: 6, 18, 26, 32, 38, 42, 46, 48.

    Attributes:
        t_max: first distance.
        t_min: distance towards which it shrinks; it never gets below.
        start: steps before this one are all computed, and so is it.
        multiple: distances are multiples of it, where ``t_min`` allows that.
    """

    can_tighten = False
    t_max: int = 12
    t_min: int = 2
    start: int = 6
    multiple: int = 2

    def __post_init__(self) -> None:
        check_count("t_min", self.t_min)
        check_count("t_max", self.t_max, self.t_min)
        check_count("start", self.start, 0)
        check_count("multiple", self.multiple)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        if steps is None:
            raise ValueError(
                "Shrinking depends on the number of steps, and nobody says it; call clock.set_step(step, steps) "
                "before each call of the model, or take Interval"
            )
        refreshed = frozenset(self.refresh_steps(steps))
        return StaticJudge(lambda step: step < self.start or step in refreshed)

    def refresh_steps(self, steps: int) -> tuple[int, ...]:
        """Indices of the computed steps from ``start`` on, of ``steps`` steps."""
        step, found = self.start, []
        while step < steps:
            found.append(step)
            wanted = round(self.t_max - (self.t_max - self.t_min) * (step - self.start) / (steps - self.start))
            step += max(wanted // self.multiple * self.multiple, self.t_min)
        return tuple(found)
