"""The plainest predictor: what was computed last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Kept, Place, Predictor


@dataclass(frozen=True)
class Reuse(Predictor):
    """The latest computed value, unchanged."""

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """See :meth:`Predictor.predict`."""
        return kept[0].value
