"""The unconditional branch of guidance as a unit: made from the conditional one (FasterCache's CFG-Cache, T-GATE)."""

from __future__ import annotations

from dataclasses import dataclass

from ..unit import Unit
from .base import RootView, Scope


@dataclass(frozen=True)
class Guidance(Scope):
    """The unconditional prediction; see :mod:`dit_accel.caching.engine.guidance` for how it is made.

    It is skipped where branches are called one by one and named ``"cond"`` and ``"uncond"``, in this order, and where
    one batch holds both, the unconditional one first. Without guidance nothing happens. The cache must decide for each
    branch (``decide="each"``), and come first in a list of caches.

    Attributes:
        low: factor on low frequencies of the kept difference, at each step within ``low_window`` that uses it.
        high: likewise on high frequencies.
        low_window: timesteps, from 1000 (noise) to 0, between which ``low`` counts.
        high_window: likewise for ``high``.
        copies: whether the conditional prediction itself stands in, without any difference (T-GATE).

    Raises:
        ValueError: for factors that are not positive.
    """

    low: float = 1.1
    high: float = 1.1
    low_window: tuple[float, float] = (99.0, 901.0)
    high_window: tuple[float, float] = (-1.0, 301.0)
    copies: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Guidance.{name} is a factor above 0, such as 1.1; got {getattr(self, name)!r}")

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`."""
        return (Unit("guidance", "guidance"),)
