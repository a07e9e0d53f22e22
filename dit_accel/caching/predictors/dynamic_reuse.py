"""FasterCache's reuse of attention: the latest value, moved on by a growing share of its latest change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Place, Predictor
from .reuse import Reuse


@dataclass(frozen=True)
class DynamicReuse(Predictor):
    """``o1 + w (o1 - o2)`` for the latest two computed values, with w growing over the steps (arXiv 2410.19355).

    Attributes:
        first: weight w at the first step.
        last: weight at the last one; equal to ``first`` for a constant weight (diffusers takes 0.5, the authors 0.3).

    Raises:
        ValueError: at prediction, if weights differ and nobody says how many steps there are.
    """

    first: float = 0.0
    last: float = 1.0
    depth = 2
    any_rows = True

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """See :meth:`Predictor.predict`. Rows (conditional ones last) that the older value lacks stay as they are."""
        latest = kept[0].value
        if len(kept) < 2:
            return latest
        older = kept[1].value[-len(latest) :]
        weight = self.weight(place)
        rows = latest[-len(older) :]
        moved = rows + weight * (rows - older)
        return moved if len(older) == len(latest) else torch.cat([latest[: -len(older)], moved])

    def weight(self, place: Place) -> float:
        """The weight at a step."""
        if self.first == self.last:
            return self.first
        if place.steps is None:
            raise ValueError(
                "the weight of DynamicReuse grows over the steps, and nobody says how many there are; call "
                "clock.set_step(step, steps) before each call of the model, or take first=last=0.5"
            )
        return self.first + (self.last - self.first) * place.step / max(place.steps - 1, 1)

    def lowered(self) -> Predictor:
        """The latest value itself."""
        return Reuse()
