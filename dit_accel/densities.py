"""How dense the attention of each call of the model was, in the latest generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .clock import StepState


class StepDensities:
    """Kept shares of (query, key) pairs, call by call; those on a device are read in the report, not before."""

    def __init__(self) -> None:
        self._generation: int | None = None
        self._of: dict[tuple[str, str, int], list[float | torch.Tensor]] = {}

    def count(self, state: StepState, density: float | torch.Tensor) -> None:
        """Takes note of one attention call.

        Args:
            state: of the call of the model that it was in; a new generation drops the one before.
            density: kept pairs over all pairs; a scalar on a device is not waited for.
        """
        if state.generation != self._generation:
            self._of.clear()
            self._generation = state.generation
        self._of.setdefault((state.expert, state.branch, state.step), []).append(density)

    def read(self) -> dict[tuple[str, str, int], float]:
        """Mean over the attention calls, by expert, branch and step; waits for the device."""
        return {place: sum(float(part) for part in parts) / len(parts) for place, parts in self._of.items()}

    def reset(self) -> None:
        """Starts anew."""
        self._of.clear()


def by_expert(densities: Mapping[tuple[str, str, int], float]) -> dict[str, dict[str, dict[int, float]]]:
    """The same as expert to branch to step."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for (expert, branch, step), density in densities.items():
        found.setdefault(expert, {}).setdefault(branch, {})[step] = density
    return found
