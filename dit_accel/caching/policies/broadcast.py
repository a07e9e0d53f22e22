"""Intervals that differ by the kind of module, inside a window of timesteps (Pyramid Attention Broadcast)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..unit import Unit
from .base import Judge, Moment, Policy, Sight
from .measure import check_count

#: Timesteps count from 0 to 1000 as in training; where a model is told t / 1000, its number is multiplied.
TIMESTEPS = 1000.0


@dataclass(frozen=True)
class Broadcast(Policy):
    """Computes every ``ranges[kind]``-th step, and all steps outside a window of timesteps (PAB, arXiv 2408.12588).

    Steps are counted in the whole schedule, not in the window, as in the authors' code.

    Attributes:
        ranges: by kind of unit, the distance of computed steps, from 1; kinds that are not listed are always computed.
        window: units may be reused where ``window[0] < t < window[1]``, t from 1000 (noise) to 0; None for always.

    Raises:
        ValueError: for ranges below 1 or a window that is empty; at run time, if a model is not told the timestep.
    """

    moment: ClassVar[Moment] = Moment.UNIT
    ranges: Mapping[str, int] = field(hash=False)
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ValueError("Broadcast.ranges gives the distance of computed steps for at least one kind of unit")
        for kind, every in self.ranges.items():
            check_count(f"the range of {kind!r}", every)
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"a window is (low, high) in timesteps from 0 to 1000, low < high; got {self.window}")

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        return BroadcastJudge(self.ranges.get(unit.kind, 1), self.window)


class BroadcastJudge(Judge):
    """At work on one unit.

    Args:
        every: distance of computed steps.
        window: of timesteps; None for no bounds.
    """

    def __init__(self, every: int, window: tuple[float, float] | None) -> None:
        self._every, self._window = every, window
        self._unit = 0.0  # what one timestep of training is in the model's own numbers; 0 until a call was seen

    def wants_compute(self, sight: Sight) -> bool:
        """See :meth:`Judge.wants_compute`."""
        return sight.step % self._every == 0 or not self._in_window(sight)

    def note(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`Judge.note`; the first call of a generation tells what the model's timesteps are counted in."""
        if self._window is not None:
            self._timestep(sight)

    def tighten(self, factor: float) -> None:
        """See :meth:`Judge.tighten`; the distance of computed steps shrinks, down to 1."""
        self._every = max(1, int(self._every * factor))

    def _in_window(self, sight: Sight) -> bool:
        return self._window is None or self._window[0] < self._timestep(sight) < self._window[1]

    def _timestep(self, sight: Sight) -> float:
        if sight.timestep is None:
            raise ValueError("a window of timesteps needs a model that is told its timestep; leave window=None")
        if not self._unit:
            self._unit = 1.0 if sight.timestep > 1.0 else 1.0 / TIMESTEPS
        return sight.timestep / self._unit
