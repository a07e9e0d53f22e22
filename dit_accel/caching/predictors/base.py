"""What a predictor is: it makes the value of a skipped unit from those of the steps that were computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where in the generation a value belongs.

    Attributes:
        step: index of the sampling step.
        sigma: noise level of the step (:class:`dit_accel.noise.Level`), None where the scheduler says none.
        steps: number of sampling steps, None where nobody says.
        paired: whether the batch holds both branches of guidance, the unconditional one first; told only to predictors
            with ``needs_pairs``.
        flow: whether that is a level of flow matching, from 0 to 1.
    """

    step: int
    sigma: float | None
    steps: int | None = None
    paired: bool = False
    flow: bool = True


@dataclass(frozen=True)
class Kept:
    """The value of a unit at a step that was computed.

    Attributes:
        place: which step.
        value: residual or output, ``[batch, tokens, channels]`` or whatever shape the unit has.
        probe: what the first blocks added at that step, where the policy probes and the predictor asks for it.
    """

    place: Place
    value: Tensor
    probe: Tensor | None = None


class Predictor(ABC):
    """A rule and its settings; immutable, without state: all it may use is what was kept.

    Attributes:
        depth: how many computed values it wants kept.
        needs_probe: whether it wants the probe kept with them.
        needs_pairs: whether it wants to know if a batch holds both branches of guidance, which waits for the device.
        any_rows: whether kept values may differ in their batch, as they do where only one branch of a batch was run.
    """

    depth: int = 1
    needs_probe: bool = False
    needs_pairs: bool = False
    any_rows: bool = False

    @abstractmethod
    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """The value at a step that is skipped; a new tensor, or the kept one itself, which nobody writes into.

        Args:
            kept: the latest computed values, newest first: at least one, at most :attr:`depth`. With fewer than
                :attr:`depth` it does what it can with them (a lower order).
            place: the step that is skipped.
            probe: what the first blocks added at that step, if :attr:`needs_probe`.
        """

    def lowered(self) -> Predictor | None:
        """The same rule with one value less to keep, for a store that is full; None if there is none."""
        return None
