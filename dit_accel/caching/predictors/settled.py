"""Extrapolation that waits until the first steps are over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..limits import check_steps, count_steps
from .base import Kept, Place, Predictor


@dataclass(frozen=True)
class Settled(Predictor):
    """Another predictor on the values of later steps alone; until there is one, the latest value is reused.

    In the first steps, where noise is nearly all, the output of a model turns sharply from step to step, and a line
    through two of them leads away from the next.

    Attributes:
        predictor: the rule.
        after: first steps whose values it does not see. An int counts steps, a float in [0, 1] is a fraction of all,
            rounded up.

    Raises:
        ValueError: a number outside these ranges; at prediction, for a fraction where nobody says how many steps there
            are.
    """

    predictor: Predictor
    after: int | float = 0.1

    def __post_init__(self) -> None:
        check_steps("after", self.after)
        for name in ("depth", "needs_probe", "needs_pairs", "any_rows"):
            object.__setattr__(self, name, getattr(self.predictor, name))

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """See :meth:`Predictor.predict`."""
        first = count_steps("after", self.after, place.steps)
        late = [item for item in kept if item.place.step >= first]
        return self.predictor.predict(late, place, probe) if late else kept[0].value

    def lowered(self) -> Predictor | None:
        """With a lower order of the rule."""
        lower = self.predictor.lowered()
        return None if lower is None else Settled(lower, self.after)
