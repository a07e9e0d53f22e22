"""Hard limits that hold for every policy."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """When a call is computed whatever the policy says.

    Besides these, the engine computes whenever nothing was kept, the shape, dtype, device or prompt of a branch
    changed, or its last call was not at the step before.

    Attributes:
        warmup: first steps that are computed. An int counts steps, a float in [0, 1] is a fraction of all, rounded up.
        cooldown: last steps that are computed; likewise. Ignored where nobody says how many steps there are.
        max_consecutive: how many steps in a row may be reused; None for any number.
        max_total: how many steps of a generation may be reused; None for any number.

    Raises:
        ValueError: numbers outside these ranges.
    """

    warmup: int | float = 0
    cooldown: int | float = 0
    max_consecutive: int | None = None
    max_total: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown"):
            check_steps(name, getattr(self, name))
        for name in ("max_consecutive", "max_total"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} is a number of steps from 0, or None for any; got {value!r}")

    def reason(self, step: int, steps: int | None, consecutive: int, total: int) -> str | None:
        """Why a step has to be computed; None if nothing here says so.

        Args:
            step: index of the step.
            steps: number of steps, None if unknown.
            consecutive: steps reused since the last computed one.
            total: steps reused in this generation.

        Raises:
            ValueError: if a fraction is given and nobody says how many steps there are.
        """
        if step < self._count("warmup", steps):
            return "warm-up"
        if steps is not None and step >= steps - self._count("cooldown", steps):
            return "cool-down"
        if self.max_consecutive is not None and consecutive >= self.max_consecutive:
            return "max_consecutive"
        if self.max_total is not None and total >= self.max_total:
            return "max_total"
        return None

    def warmup_steps(self, steps: int | None) -> int:
        """How many first steps are computed, of ``steps``, which may be None if ``warmup`` counts them."""
        return self._count("warmup", steps)

    def _count(self, name: str, steps: int | None) -> int:
        return count_steps(name, getattr(self, name), steps)


def check_steps(name: str, value: int | float) -> None:
    """Refuses what is neither a number of steps nor a fraction of all.

    Raises:
        ValueError: naming what there may be.
    """
    is_fraction = isinstance(value, float)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is a number of steps or a fraction of all; got {value!r}")
    if not (0 <= value <= 1 if is_fraction else value >= 0):
        raise ValueError(f"{name} counts steps from 0, or is a fraction in [0, 1]; got {value}")


def count_steps(name: str, value: int | float, steps: int | None) -> int:
    """How many steps a number or a fraction of ``steps`` is; fractions are rounded up.

    Raises:
        ValueError: if a fraction is given and nobody says how many steps there are.
    """
    if not isinstance(value, float):
        return int(value)
    if steps is None:
        raise ValueError(
            f"{name}={value} is a fraction, and nobody says how many steps there are; give an int, or call "
            "clock.set_step(step, steps) before each call of the model"
        )
    return math.ceil(value * steps - 1e-9)
