"""T-GATE's rule: cross-attention until the gate, self-attention at intervals before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..unit import Unit
from .base import Judge, Moment, Policy
from .measure import check_count
from .static import StaticJudge


@dataclass(frozen=True)
class Gate(Policy):
    """Before the gate self-attention is reused in between, behind it cross-attention always is (arXiv 2404.02747).

    =============  =======================================================  ================================
    kind           computed at steps before ``step``                        computed at steps from ``step``
    =============  =======================================================  ================================
    self           0 to ``warmup``, multiples of ``sp_interval``, the last  multiples of ``fi_interval``
    cross          all                                                      none
    guidance       all                                                      none
    =============  =======================================================  ================================

    Other kinds are always computed.

    Attributes:
        step: the gate, from 1: the first step that does without cross-attention.
        sp_interval: distance of computed self-attention before the gate, while semantics are planned.
        fi_interval: likewise behind it, while details are refined; 1 computes all.
        warmup: the last of the first steps whose self-attention is all computed.
    """

    moment: ClassVar[Moment] = Moment.UNIT
    can_tighten = False
    step: int = 10
    sp_interval: int = 5
    fi_interval: int = 1
    warmup: int = 2

    def __post_init__(self) -> None:
        for name in ("step", "sp_interval", "fi_interval"):
            check_count(f"Gate.{name}", getattr(self, name))
        check_count("Gate.warmup", self.warmup, 0)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        if unit.kind == "self":
            return StaticJudge(self._computes_self)
        if unit.kind in ("cross", "guidance"):
            return StaticJudge(lambda step: step < self.step)
        return StaticJudge(lambda step: True)

    def _computes_self(self, step: int) -> bool:
        if step >= self.step:
            return step % self.fi_interval == 0
        return step <= self.warmup or step == self.step - 1 or step % self.sp_interval == 0
