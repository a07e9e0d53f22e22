"""EasyCache: the rate at which the output follows the latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..unit import Unit
from .base import Judge, Moment, Policy, Sight
from .measure import check_threshold, keep, mean_size
from .threshold import ThresholdJudge


@dataclass(frozen=True)
class Transform(Policy):
    """Reuses while the estimated change of the output, summed over steps, stays below a threshold (EasyCache).

    Zhou et al., arXiv 2507.02860. From the two latest computed steps ``b < c`` it takes the rate
    ``k = mean|v_c - v_b| / mean|x_c - x_b|`` of output to latents, and adds ``k mean|x_s - x_{s-1}| / mean|v_c|`` for
    each step ``s``. The sum starts anew at each computed step. No calibration.

    Attributes:
        threshold: sum from which on it computes; 0 computes always.
    """

    moment: ClassVar[Moment] = Moment.CALL

    threshold: float

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)
        object.__setattr__(self, "needs_output", True)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        return _TransformJudge(self.threshold)


class _TransformJudge(ThresholdJudge):
    def __init__(self, threshold: float) -> None:
        super().__init__(threshold)
        self._previous: Tensor | None = None  # latents of the step before
        self._latents: Tensor | None = None  # of the latest computed step, and its output
        self._output: Tensor | None = None
        self._rate: Tensor | None = None

    def measure(self, sight: Sight) -> float | None:
        """See :meth:`ThresholdJudge.measure`."""
        if self._rate is None or self._previous is None or self._output is None:
            return None
        if self._previous.shape != sight.latents.shape:
            return None
        moved = mean_size(sight.latents - self._previous.to(sight.latents))
        self.accumulated += float(self._rate * (moved / mean_size(self._output)))
        return self.accumulated

    def remember(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`ThresholdJudge.remember`."""
        self._previous = keep(sight.latents)
        if not computed:
            return
        if output is None:
            raise ValueError("Transform needs the model's output at computed steps; use it for whole calls alone")
        latents_before, before = self._latents, self._output
        self._latents, self._output = self._previous, keep(output)
        if latents_before is None or before is None or before.shape != output.shape:
            return
        if latents_before.shape == sight.latents.shape:
            self._rate = mean_size(output - before.to(output)) / mean_size(
                sight.latents - latents_before.to(sight.latents)
            )
