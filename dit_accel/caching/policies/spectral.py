"""SeaCache: changes of the latents behind the filter that best tells signal from noise at their noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...noise import noise_share
from ..unit import Unit
from .base import Judge, Moment, Policy, Sight
from .measure import check_threshold, generated_part, keep
from .threshold import ThresholdJudge


@dataclass(frozen=True)
class Spectral(Policy):
    """Sums the change of filtered latents over steps and reuses while the sum stays below a threshold (SeaCache).

    arXiv 2602.18993, on the latents as in diffusers' ``SeaCacheConfig``. Along each axis of the grid the filter is
    Wiener's for a signal of power ``|f|^-exponent`` in ``(1 - sigma) signal + sigma noise``; their product is divided
    by its mean, so that steps compare. The sum starts anew at each computed step. Channels beside the latents, of a
    picture or mask that the model is given, are left out.

    Attributes:
        threshold: sum from which on it computes; 0 computes always.
        exponent: of the power of clean signals; 3 in the published settings for videos.
        axes: dimensions of the latents that are frames, height and width, or height and width. None for all behind
            batch and channels; tokens ``[batch, tokens, channels]`` are put on their grid.
    """

    moment: ClassVar[Moment] = Moment.CALL

    threshold: float
    exponent: float = 3.0
    axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)
        if not 0 < self.exponent < math.inf:
            raise ValueError(f"exponent is a positive number; got {self.exponent}")

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        return _SpectralJudge(self)

    def filtered(self, sight: Sight) -> Tensor:
        """The latents of a step behind the filter of its noise level, float32.

        Raises:
            ValueError: without a noise level, or a grid where one is needed.
        """
        latents, axes = self._on_grid(sight)
        return spectral_filter(latents, axes, self._noise_share(sight), self.exponent)

    def _noise_share(self, sight: Sight) -> float:
        if sight.sigma is None:
            raise ValueError(
                "Spectral needs the noise level of each step, and the scheduler has neither sigmas nor "
                "alphas_cumprod; use one that does, or a policy that needs none (Transform, ProbeDiff)"
            )
        return noise_share(sight.sigma, sight.flow)

    def _on_grid(self, sight: Sight) -> tuple[Tensor, tuple[int, ...]]:
        latents = sight.latents
        if self.axes is not None:
            if not all(0 < axis < latents.ndim for axis in self.axes):
                raise ValueError(
                    f"axes {self.axes} are not all dimensions of latents {tuple(latents.shape)} behind the batch"
                )
            return latents, self.axes
        if latents.ndim > 3:
            return latents, tuple(range(2, latents.ndim))
        if latents.ndim != 3 or sight.grid is None or math.prod(sight.grid) > latents.shape[1]:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} are on no grid that is known; use a model whose latents are "
                "[batch, channels, ..., height, width], or a policy that needs no grid (Transform, ProbeDiff)"
            )
        # Reference images stand behind the tokens of the picture and do not change.
        tokens = latents[:, : math.prod(sight.grid)]
        return tokens.unflatten(1, sight.grid), (1, 2, 3)


class _SpectralJudge(ThresholdJudge):
    def __init__(self, policy: Spectral) -> None:
        super().__init__(policy.threshold)
        self.policy = policy
        self._previous: Tensor | None = None
        self._current: tuple[int, Tensor] | None = None  # step, filtered: not filtered again in the same step
        self._generated: torch.Size | None = None  # shape of what the model gives, once that is known

    def measure(self, sight: Sight) -> float | None:
        """See :meth:`ThresholdJudge.measure`."""
        now, before = self._filtered(sight), self._previous
        if before is None or before.shape != now.shape:
            return None
        rest = tuple(range(1, now.ndim))
        changes = (now - before).abs().mean(dim=rest) / (before.abs().mean(dim=rest) + 1e-16)
        self.accumulated += float(changes.mean())
        return self.accumulated

    def remember(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`ThresholdJudge.remember`."""
        if output is not None and output.shape != self._generated:
            self._generated, self._current = output.shape, None
        self._previous, self._current = self._filtered(sight), None

    def _filtered(self, sight: Sight) -> Tensor:
        if self._current is None or self._current[0] != sight.step:
            latents = sight.latents
            if self._generated is not None:  # pictures that the model is given beside them never change
                part = generated_part(latents, self._generated)
                latents = latents if part is None else part
            self._current = sight.step, keep(self.policy.filtered(replace(sight, latents=latents)))
        return self._current[1]


def spectral_filter(latents: Tensor, axes: Sequence[int], share: float, exponent: float) -> Tensor:
    """Wiener's filter along each axis, their product divided by its mean.

    Along an axis the gain at frequency ``f`` (cycles per sample) is
    ``(1 - share) S / ((1 - share)^2 S + share^2)`` with ``S = |f|^-exponent``.

    Args:
        latents: any shape; computed in float32.
        axes: dimensions that are filtered, of any lengths.
        share: of noise in the latents, between 0 and 1 and neither.
        exponent: of the signal's power.
    """
    gain = torch.ones((), device=latents.device)
    for axis in axes:
        frequencies = torch.fft.fftfreq(latents.shape[axis], device=latents.device).abs()
        # Numerator and denominator times |f|^exponent, so that f = 0 is no special case.
        along = (1 - share) / ((1 - share) ** 2 + share**2 * frequencies**exponent)
        shape = [1] * latents.ndim
        shape[axis] = -1
        gain = gain * (along / along.mean()).view(shape)  # the mean of a product over a grid is that of the means
    spectrum = torch.fft.fftn(latents.float(), dim=tuple(axes))
    return torch.fft.ifftn(spectrum * gain, dim=tuple(axes)).real
