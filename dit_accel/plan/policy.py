"""When a method runs dense although it has a plan."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlanPolicy:
    """Dense warm-up: the first steps fix the layout of the video, and some layers spread their attention wide.

    The defaults are those published for Wan 2.1 (Radial Attention, arXiv 2506.19852): 12 of 50 steps and the first
    layer.  The steps are given as a fraction, because a shorter schedule wants fewer dense ones.

    Attributes:
        dense_steps: First steps of a generation that stay dense.  An int counts steps, a float between 0 and 1 is a
            fraction of all steps, rounded up (so 1 is one step and 1.0 is all of them).
        dense_layers: Layers that stay dense at every step.  An int means the first so many, a collection lists
            layer indices.

    Raises:
        ValueError: Negative numbers, or a fraction above 1.
        TypeError: Anything but numbers.
    """

    dense_steps: int | float = 0.24
    dense_layers: int | Collection[int] = 1

    def __post_init__(self) -> None:
        _check_steps(self.dense_steps)
        if not isinstance(self.dense_layers, Collection):
            _check_count("dense_layers", self.dense_layers)
            return
        layers = frozenset(self.dense_layers)
        for layer in layers:
            _check_count("a layer index in dense_layers", layer)
        # Frozen, so that a policy can be part of a key and a list given by the caller cannot change it later.
        object.__setattr__(self, "dense_layers", layers)

    def dense_step_count(self, num_steps: int | None) -> int:
        """Gives the number of dense steps out of `num_steps`, which may be unknown (None) if a number was given.

        Raises:
            ValueError: `dense_steps` is a fraction of an unknown number.
        """
        if num_steps is None:
            if isinstance(self.dense_steps, float):
                raise ValueError(
                    f"dense_steps={self.dense_steps} is a fraction, and nobody says how many steps there are. Give an "
                    "int, or call clock.set_step(step, steps) before each call of the model."
                )
            return self.dense_steps
        if isinstance(self.dense_steps, float):
            # The slack keeps a fraction such as 0.07 of 100 from becoming 8 by rounding error.
            return min(num_steps, math.ceil(self.dense_steps * num_steps - 1e-9))
        return min(num_steps, self.dense_steps)

    def is_dense(self, step_index: int, num_steps: int | None, layer: int) -> bool:
        """Tells whether a layer stays dense at a step.

        Args:
            step_index: Step of the generation, from 0.
            num_steps: Steps of the generation, None if unknown.
            layer: Index of the transformer block, from 0.

        Raises:
            ValueError: The step is not one of `num_steps`, the layer is negative, or a fraction of an unknown number
                of steps is asked for.
        """
        if step_index < 0 or (num_steps is not None and step_index >= num_steps):
            raise ValueError(
                f"step_index must lie in 0 to num_steps - 1 (num_steps is {num_steps}), got {step_index}."
            )
        if layer < 0:
            raise ValueError(f"layer must not be negative, got {layer}. Count blocks from 0.")
        return step_index < self.dense_step_count(num_steps) or self._is_dense_layer(layer)

    def settings(self) -> dict[str, Any]:
        """Gives the arguments that build an equal policy, as plain values."""
        layers = self.dense_layers
        return {
            "dense_steps": self.dense_steps,
            "dense_layers": sorted(layers) if isinstance(layers, Collection) else layers,
        }

    def _is_dense_layer(self, layer: int) -> bool:
        if isinstance(self.dense_layers, Collection):
            return layer in self.dense_layers
        return layer < self.dense_layers


def _check_steps(value: object) -> None:
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise ValueError(
                f"dense_steps as a fraction must lie between 0 and 1, got {value}. Use an int to count steps."
            )
        return
    _check_count("dense_steps", value)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}. Use 0 for none.")
