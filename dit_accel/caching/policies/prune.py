"""A policy that decides for every block by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..unit import Unit
from .base import Judge, Moment, Policy, Sight
from .measure import check_count, check_threshold, keep, relative_change
from .threshold import ThresholdJudge, signal_of


@dataclass(frozen=True)
class UnitDiff(Policy):
    """Skips a unit whose input changed little since it was last computed (DBPrune of cache-dit).

    Reuses iff ``mean|h_s - h_c| / mean|h_c| < threshold``, where ``h`` is the input of the unit, now and when it was
    computed last. With ``dynamic`` the threshold of a step is ``relax * mean`` of the changes above 0 among the first
    ``window`` that were measured in this step, if that lies between ``threshold`` and ``most``; else it is
    ``threshold``.

    Attributes:
        threshold: the change from which on a unit is computed; 0 computes always.
        dynamic: whether the changes of earlier units raise it. Needs judges made together (:meth:`Policy.judges`).
        relax: factor on their mean.
        most: bound below which a raised threshold has to lie; None for twice the threshold.
        window: how many changes of the step are averaged.
    """

    moment: ClassVar[Moment] = Moment.UNIT

    threshold: float
    dynamic: bool = False
    relax: float = 1.25
    most: float | None = None
    window: int = 5

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)
        check_threshold("relax", self.relax)
        check_count("window", self.window)
        if self.most is not None:
            check_threshold("most", self.most)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`.

        Raises:
            ValueError: with ``dynamic``, whose judges must know each other.
        """
        if self.dynamic:
            raise ValueError("a dynamic threshold depends on other units; make all judges at once by judges()")
        return _UnitJudge(self, _Board())

    def judges(self, units: Sequence[Unit], steps: int | None) -> tuple[Judge, ...]:
        """See :meth:`Policy.judges`."""
        board = _Board()
        return tuple(_UnitJudge(self, board) for _ in units)


@dataclass
class _Board:
    """The changes measured in the current step, in the order of the units."""

    step: int = -1
    changes: list[float] = field(default_factory=list)

    def at(self, step: int) -> list[float]:
        if step != self.step:
            self.step, self.changes = step, []
        return self.changes


class _UnitJudge(ThresholdJudge):
    def __init__(self, policy: UnitDiff, board: _Board) -> None:
        super().__init__(policy.threshold)
        self.policy, self.board = policy, board
        self._least = policy.threshold  # what the threshold is, unless raised
        self._entered: Tensor | None = None

    def wants_compute(self, sight: Sight) -> bool:
        """See :meth:`Judge.wants_compute`."""
        self.value = self.measure(sight)
        if self.value is None:
            return True
        earlier = self.board.at(sight.step)
        self.threshold = self._raised(earlier) if self.policy.dynamic else self._least
        earlier.append(self.value)
        return not self.value < self.threshold

    def tighten(self, factor: float) -> None:
        """See :meth:`Judge.tighten`."""
        self._least *= factor

    def measure(self, sight: Sight) -> float | None:
        """See :meth:`ThresholdJudge.measure`."""
        entered = signal_of(sight)
        if self._entered is None or self._entered.shape != entered.shape:
            return None
        return float(relative_change(entered, self._entered))

    def remember(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`ThresholdJudge.remember`."""
        if computed:
            self._entered = keep(signal_of(sight))

    def _raised(self, earlier: Sequence[float]) -> float:
        changes = [change for change in earlier[: self.policy.window] if change > 0]
        if not changes or self._least <= 0:
            return self._least
        raised = self.policy.relax * sum(changes) / len(changes)
        most = 2 * self._least if self.policy.most is None else self.policy.most
        return raised if self._least < raised < most else self._least
