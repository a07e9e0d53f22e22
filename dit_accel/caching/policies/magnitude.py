"""MagCache: calibrated ratios of how large residuals are from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..unit import Unit
from .base import Judge, Policy, Sight
from .measure import check_count, check_threshold
from .threshold import ThresholdJudge


@dataclass(frozen=True)
class Magnitude(Policy):
    """Reuses while calibrated ratios say that the residual kept its size (MagCache).

    Ma et al., arXiv 2506.09045. ``gamma_s`` is the ratio of the residual's size at step ``s`` to that at the step
    before, measured once. The product ``Pi`` of the ratios since the latest computed step is the size of the true
    residual over that of the kept one; ``|1 - Pi|`` is summed over the skipped steps. It reuses iff the sum is below
    ``threshold`` and no more than ``max_skips`` steps are skipped in a row. Nothing is looked at, so all prompts have
    the same steps.

    Attributes:
        ratios: ``gamma`` of every step of the calibration; the first is 1. For another number of steps the ratio of
            the nearest step is taken. They depend on model, scheduler, shift and guidance.
        threshold: sum from which on it computes; 0 computes always.
        max_skips: how many steps in a row may be skipped.
        always: indices into ``ratios`` whose steps are computed in any case.
    """

    ratios: tuple[float, ...]
    threshold: float
    max_skips: int
    always: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)
        check_count("max_skips", self.max_skips, 0)
        ratios = tuple(float(ratio) for ratio in self.ratios)
        if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
            raise ValueError(
                "ratios are positive numbers, one for each step of the calibration; see MagnitudeRecorder"
            )
        object.__setattr__(self, "ratios", ratios)
        for index in self.always:
            if not 0 <= index < len(ratios):
                raise ValueError(f"always lists indices from 0 to {len(ratios) - 1}; got {index}")

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`.

        Raises:
            ValueError: if nobody says how many steps there are.
        """
        if steps is None:
            raise ValueError(
                "ratios belong to steps, and nobody says how many there are; call clock.set_step(step, steps) before "
                "each call of the model"
            )
        return _MagnitudeJudge(self, nearest_indices(len(self.ratios), steps))


class _MagnitudeJudge(ThresholdJudge):
    def __init__(self, policy: Magnitude, indices: Sequence[int]) -> None:
        super().__init__(policy.threshold)
        self.policy, self.indices = policy, indices
        self._product, self._skipped = 1.0, 0

    def wants_compute(self, sight: Sight) -> bool:
        """See :meth:`Judge.wants_compute`."""
        wants = super().wants_compute(sight)
        return wants or self._skipped > self.policy.max_skips

    def measure(self, sight: Sight) -> float | None:
        """See :meth:`ThresholdJudge.measure`; None for steps that are always computed."""
        if sight.step >= len(self.indices):
            return None
        index = self.indices[sight.step]
        self._product *= self.policy.ratios[index]
        self._skipped += 1
        self.accumulated += abs(1.0 - self._product)
        return None if index in self.policy.always else self.accumulated

    def remember(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`ThresholdJudge.remember`."""
        if computed:
            self._product, self._skipped = 1.0, 0


def nearest_indices(calibrated: int, steps: int) -> tuple[int, ...]:
    """Which step of a calibration of ``calibrated`` steps stands for each of ``steps`` steps; ends match ends."""
    if steps == 1:
        return (calibrated - 1,)
    return tuple(round(step * (calibrated - 1) / (steps - 1)) for step in range(steps))


def token_norms(residual: Tensor) -> Tensor:
    """Lengths of the tokens of a residual ``[..., tokens, channels]``, as :func:`magnitude_ratios` wants them."""
    return torch.linalg.vector_norm(residual.detach(), dim=-1, dtype=torch.float32)


def magnitude_ratios(norms: Sequence[Tensor]) -> tuple[float, ...]:
    """Ratios for :class:`Magnitude` from one dense run.

    Args:
        norms: for each step, in order, the length of the whole residual at every token (:func:`token_norms`).

    Returns:
        1 for the first step, then the mean over tokens of the length over that at the step before.

    Raises:
        ValueError: for no steps, steps of different shapes, or ratios that are not finite.
    """
    if not norms:
        raise ValueError("a calibration has one entry for each step; got none")
    if len({tuple(norm.shape) for norm in norms}) > 1:
        raise ValueError("the steps of a calibration must have equally many tokens; record one generation at a time")
    ratios = [torch.ones((), device=norms[0].device)]
    ratios += [(now / before).mean() for before, now in pairwise(norms)]
    found = tuple(torch.stack(ratios).tolist())
    if not all(0 < ratio < math.inf for ratio in found):
        raise ValueError("some residuals are zero or not finite, so their ratios are no numbers; record another run")
    return found
