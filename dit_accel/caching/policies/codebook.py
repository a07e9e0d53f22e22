"""AdaCache: how much the output changed between two computed steps says when to compute next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..unit import Unit
from .base import Judge, Moment, Policy, Sight
from .measure import check_count, check_threshold, keep, mean_size, relative_change

_Codebook = tuple[tuple[float, int], ...]

#: Codebooks of the paper's code, for Open-Sora: change below which so many steps pass until the next computed one.
CODEBOOKS: dict[str, _Codebook] = {
    "fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.00, 1)),  # 30 steps
    "slow": ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.00, 1)),  # 30 steps
    "100 steps": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.00, 3)),
}


@dataclass(frozen=True)
class MotionRegularization:
    """Makes intervals shorter where much moves (MoReg): factors on the measured change.

    Motion is ``m = mean|v[1:] - v[:-1]| / (mean|v[1:]| + mean|v[:-1]|)`` over frames of the output. Its factor is
    ``g = (m / usual)^power``, plus ``gradient |g - g'| / interval``, where ``g'`` is that of the computed step before.

    Attributes:
        usual: motion whose factor is 1.
        power: how sharply the factor follows the motion.
        gradient: what a change of the factor counts.
        window: shares of the steps between which ``g`` is taken from the motion; elsewhere it is 1.
        axis: dimension of the output that is frames.
    """

    usual: float = 0.385
    power: float = 8.0
    gradient: float = 10.0
    window: tuple[float, float] = (0.1, 0.9)
    axis: int = 2

    def __post_init__(self) -> None:
        if not (0 < self.usual < math.inf and self.power > 0 and self.gradient >= 0):
            raise ValueError("usual and power are positive numbers, gradient one from 0")

    def motion(self, output: Tensor) -> float:
        """The relative change from frame to frame, from 0 to 1.

        Raises:
            ValueError: if the output has no frames there.
        """
        frames = output.shape[self.axis] if output.ndim == 5 else 0
        if frames < 2:
            raise ValueError(
                f"motion needs an output of several frames along dimension {self.axis}; got {tuple(output.shape)}. "
                "Leave motion out"
            )
        later, earlier = output.narrow(self.axis, 1, frames - 1), output.narrow(self.axis, 0, frames - 1)
        return float(mean_size(later - earlier) / (mean_size(later) + mean_size(earlier)))


@dataclass(frozen=True)
class Codebook(Policy):
    """Looks up the distance of the next computed step by the change between the two latest ones (AdaCache).

    Kahatapitiya et al., arXiv 2411.02397. At each computed step the change ``mean|v - v'| / mean|v'|`` of the output
    since the computed step before, divided by their distance, is looked up in a codebook. The paper measures the
    residual of one attention in the middle of the model; this takes the model's output, which every model has, so that
    its codebooks are a start and no more.

    Attributes:
        codebook: pairs of a change, rising, and the distance for changes below it; the last holds for all above too.
        motion: shortens distances where much moves; None for not.
    """

    moment: ClassVar[Moment] = Moment.CALL

    codebook: _Codebook = CODEBOOKS["fast"]
    motion: MotionRegularization | None = None

    def __post_init__(self) -> None:
        changes = [change for change, _ in self.codebook]
        if not changes or changes != sorted(changes):
            raise ValueError(f"a codebook is pairs of a change, rising, and a distance in steps; got {self.codebook}")
        for change, distance in self.codebook:
            check_threshold("a change in a codebook", change)
            check_count("a distance in a codebook", distance)
        object.__setattr__(self, "needs_output", True)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`.

        Raises:
            ValueError: with motion, if nobody says how many steps there are.
        """
        if self.motion is not None and steps is None:
            raise ValueError(
                "the window of MotionRegularization needs the number of steps; call clock.set_step(step, steps)"
            )
        return _CodebookJudge(self, steps)


class _CodebookJudge(Judge):
    def __init__(self, policy: Codebook, steps: int | None) -> None:
        self.policy, self._steps = policy, steps
        self._scale = 1.0  # of measured changes; tightening makes them larger
        self._output: Tensor | None = None
        self._at, self._factor = 0, 1.0
        self._distance = 1

    def wants_compute(self, sight: Sight) -> bool:
        """See :meth:`Judge.wants_compute`."""
        return sight.step - self._at >= self._distance

    def note(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`Judge.note`; the report has the latest change."""
        if not computed:
            return
        if output is None:
            raise ValueError("Codebook needs the model's output at computed steps; use it for whole calls alone")
        before, passed = self._output, sight.step - self._at
        if before is not None and before.shape == output.shape and passed > 0:
            self.value = float(relative_change(output, before)) / passed * self._motion(sight.step, output, passed)
            self._distance = self._look_up(self.value * self._scale)
        else:
            self._distance = 1
        self._output, self._at = keep(output), sight.step

    def tighten(self, factor: float) -> None:
        """See :meth:`Judge.tighten`."""
        self._scale /= factor

    def _look_up(self, change: float) -> int:
        if math.isnan(change):
            return 1
        return next(
            (distance for most, distance in self.policy.codebook if change < most), self.policy.codebook[-1][1]
        )

    def _motion(self, step: int, output: Tensor, passed: int) -> float:
        rule = self.policy.motion
        if rule is None or self._steps is None:
            return 1.0
        factor = 1.0
        if rule.window[0] * self._steps <= step + 1 <= rule.window[1] * self._steps:
            factor = (rule.motion(output) / rule.usual) ** rule.power
        grown, self._factor = factor - self._factor, factor
        return factor + rule.gradient * abs(grown) / passed
