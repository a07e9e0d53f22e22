"""TeaCache: a polynomial of how much the modulated input changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..unit import Unit
from .base import Judge, Moment, Policy, Sight
from .measure import check_threshold, keep, relative_change
from .threshold import ThresholdJudge, signal_of


@dataclass(frozen=True)
class Polynomial(Policy):
    """Sums ``P(rel(m_s, m_{s-1}))`` over steps and reuses while the sum stays below a threshold (TeaCache).

    Liu et al., arXiv 2411.19108. ``m`` is the modulated input of the first block and ``P`` a polynomial fitted to how
    much the model's output changes. The sum starts anew at each computed step. In Wan ``m`` is the embedding of the
    timestep: it depends on nothing else, so the steps that are computed are the same for all prompts.

    Attributes:
        coefficients: of ``P``, highest power first.
        threshold: sum from which on it computes; 0 computes always, whatever the sign of ``P``.
        signal: which modulated input (``Family.modulated``).
    """

    moment: ClassVar[Moment] = Moment.INPUT

    coefficients: tuple[float, ...]
    threshold: float
    signal: str = "default"

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)
        if not self.coefficients:
            raise ValueError("a polynomial has at least one coefficient; (1, 0) leaves the change as it is")
        object.__setattr__(self, "coefficients", tuple(float(each) for each in self.coefficients))

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        return _PolynomialJudge(self)

    def at(self, change: float) -> float:
        """``P(change)``."""
        total = 0.0
        for coefficient in self.coefficients:
            total = total * change + coefficient
        return total


class _PolynomialJudge(ThresholdJudge):
    def __init__(self, policy: Polynomial) -> None:
        super().__init__(policy.threshold)
        self.policy = policy
        self._previous: Tensor | None = None

    def measure(self, sight: Sight) -> float | None:
        """See :meth:`ThresholdJudge.measure`."""
        signal = signal_of(sight)
        if self._previous is None or self._previous.shape != signal.shape:
            return None
        self.accumulated += self.policy.at(float(relative_change(signal, self._previous)))
        return self.accumulated

    def remember(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`ThresholdJudge.remember`."""
        self._previous = keep(signal_of(sight))
