"""What a scope is: it says which parts of a model a cache may skip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ..unit import Unit


@dataclass(frozen=True)
class RootView:
    """What a scope may look at.

    Attributes:
        root: the transformer or UNet.
        name: its class name.
        blocks: path of every block in execution order.
        modules: path and kind of every attention (``"self"``, ``"cross"``, ``"joint"``, ``"temporal"``) and
            feed-forward (``"mlp"``) module inside blocks, in execution order.
        is_unet: whether its blocks have other outputs than they have inputs, so that only ``"deep"``, ``"output"`` and
            single modules can be skipped.
    """

    root: Any
    name: str
    blocks: tuple[str, ...]
    modules: tuple[tuple[str, str], ...]
    is_unet: bool


class Scope(ABC):
    """Which units of a model may be skipped; an immutable recipe."""

    @abstractmethod
    def units(self, view: RootView) -> tuple[Unit, ...]:
        """The units in one model; block ranges must not overlap.

        Raises:
            ValueError: if the model has no such part, naming the valid range.
        """

    def is_active(self, unit: Unit, step: int, steps: int | None) -> bool:
        """Whether a unit may be skipped at a step at all; else it is computed, and its value kept."""
        return True
