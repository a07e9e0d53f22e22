"""The whole call of the model as one unit, predicted at its output."""

from __future__ import annotations

from dataclasses import dataclass

from ..unit import Unit
from .base import RootView, Scope


@dataclass(frozen=True)
class Output(Scope):
    """The model is not run at all when it is skipped; its output is predicted (EasyCache, arXiv 2507.02860).

    What is kept is 10 to 100 times smaller than a residual of tokens.

    Attributes:
        residual: whether the difference of output and latents is kept, and the latents of the skipped step are added
            to what is predicted; else the output itself. Where the model takes more channels than it gives (image to
            video), its first channels are the latents; where it gives more (learned variance), the output is kept.
    """

    residual: bool = True

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`."""
        return (Unit("output", "output"),)
