"""What judges with a threshold share."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from .base import Judge, Sight


class ThresholdJudge(Judge):
    """Reuses while a number stays below a threshold; a NaN computes, and so does a threshold of 0.

    Args:
        threshold: what the number must stay below.

    Attributes:
        accumulated: sum of the numbers since the latest computed step, for rules that accumulate.
    """

    threshold: float

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.accumulated = 0.0

    @abstractmethod
    def measure(self, sight: Sight) -> float | None:
        """The number to compare with the threshold; None if there is nothing to compare with yet."""

    @abstractmethod
    def remember(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """Keeps what :meth:`measure` needs at later steps; called after every call."""

    def wants_compute(self, sight: Sight) -> bool:
        """See :meth:`Judge.wants_compute`."""
        self.value = self.measure(sight)
        return self.value is None or self.threshold <= 0 or not self.value < self.threshold

    def note(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`Judge.note`."""
        if computed:
            self.accumulated = 0.0
        self.remember(sight, computed, output)

    def tighten(self, factor: float) -> None:
        """See :meth:`Judge.tighten`."""
        self.threshold *= factor


def signal_of(sight: Sight) -> Tensor:
    """The signal, which an engine gives at every moment but CALL.

    Raises:
        ValueError: if there is none.
    """
    if sight.signal is None:
        raise ValueError(
            f"no signal came with step {sight.step} of {sight.expert!r}; the model has no such input (see "
            "Family.modulated and Family.block_streams). Take a policy that looks at something else"
        )
    return sight.signal
