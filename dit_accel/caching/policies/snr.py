"""Computed steps at equal distances in log signal-to-noise ratio and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...noise import Level, is_pure_noise, log_snr
from ..unit import Unit
from .base import Judge, Moment, Policy, Sight
from .measure import check_threshold
from .threshold import ThresholdJudge

_UNIT = Unit("output", "output")


@dataclass(frozen=True)
class SnrGap(Policy):
    """Reuses while ``|lambda_s - lambda_c| + pace (s - c) / steps < threshold``, with ``lambda = log(alpha / sigma)``.

    Steps ``s`` that lie evenly in ``lambda`` are where DPM-Solver (arXiv 2206.00927) puts its evaluations. Most
    samplers step evenly in time, so ``lambda`` is slow in the middle of a generation and fast at both ends, where
    outputs change fast as well; ``pace`` keeps the gaps in the middle from growing without bound. Only noise levels
    are looked at: the computed steps are the same for all prompts. Schedulers of flow matching and of diffusion count
    alike (:class:`dit_accel.noise.Level`).

    A first step of pure noise, whose ``lambda`` is infinite, counts as half a step before it ends:
    ``log 2`` below that of the step behind it.

    Attributes:
        threshold: distance from the latest computed step ``c`` from which on it computes; 0 computes always.
        pace: what a whole generation counts, in units of ``lambda``; 0 for distances in ``lambda`` alone.

    Raises:
        ValueError: for numbers below 0; at a step without a noise level; and with a pace where nobody says how many
            steps there are.
    """

    moment: ClassVar[Moment] = Moment.CALL

    threshold: float
    pace: float = 0.0

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)
        check_threshold("pace", self.pace)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        if self.pace and steps is None:
            raise ValueError(
                "SnrGap measures its pace by the number of steps, and nobody says it; call clock.set_step(step, "
                "steps) before each call of the model, or give pace=0"
            )
        return _SnrGapJudge(self)

    def level(self, sight: Sight) -> float | None:
        """``lambda`` of a step; None if it is pure noise.

        Raises:
            ValueError: without a noise level.
        """
        if sight.sigma is None:
            raise ValueError(
                "SnrGap needs the noise level of each step, and the scheduler has neither sigmas nor alphas_cumprod; "
                "use one that does, or a policy that needs none (Interval, Transform)"
            )
        return None if is_pure_noise(sight.sigma, sight.flow) else log_snr(sight.sigma, sight.flow)

    def computed_steps(self, levels: Sequence[Level]) -> tuple[int, ...]:
        """The steps of a generation that are computed.

        Args:
            levels: of every step.
        """
        judge = self.judge(_UNIT, len(levels))
        found: list[int] = []
        for step, (timestep, sigma, flow) in enumerate(levels):
            before = found[-1] if found else None
            sight = Sight(step, len(levels), "", "", _UNIT, sigma, timestep, torch.empty(0), None, before, flow=flow)
            computes = not found or judge.wants_compute(sight)
            judge.note(sight, computes, None)
            if computes:
                found.append(step)
        return tuple(found)


class _SnrGapJudge(ThresholdJudge):
    def __init__(self, policy: SnrGap) -> None:
        super().__init__(policy.threshold)
        self._policy = policy
        self._computed: float | None = None  # lambda of the latest computed step
        self._step = 0  # and that step

    def measure(self, sight: Sight) -> float | None:
        """See :meth:`ThresholdJudge.measure`."""
        level = self._policy.level(sight)
        if level is None:
            return 0.0 if self._computed is None else None  # behind pure noise nothing is known to have changed
        if self._computed is None:
            self._computed = level - math.log(2)
        passed = (sight.step - self._step) / sight.steps if sight.steps else 0.0
        return abs(level - self._computed) + self._policy.pace * passed

    def remember(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`ThresholdJudge.remember`."""
        if computed:
            self._computed, self._step = self._policy.level(sight), sight.step
