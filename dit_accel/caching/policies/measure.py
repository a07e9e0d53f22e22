"""What policies measure on tensors, and the ranges of their settings."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """``mean|now - before| / mean|before|`` as a scalar on the device, in float32; NaN or infinite for zeros before.

    Raises:
        ValueError: for different shapes.
    """
    if now.shape != before.shape:
        raise ValueError(f"tensors of shape {tuple(now.shape)} and {tuple(before.shape)} cannot be compared")
    before = before.to(now)
    return mean_size(now - before) / mean_size(before)


def mean_size(tensor: Tensor) -> Tensor:
    """``mean|tensor|`` as a scalar on the device, summed in float32."""
    return tensor.abs().mean(dtype=torch.float32)


def keep(tensor: Tensor) -> Tensor:
    """A copy that nobody writes into."""
    return tensor.detach().clone()


def generated_part(latents: Tensor, shape: torch.Size) -> Tensor | None:
    """The part of the latents that has a shape, that of the model's output; None if there is none.

    Models that are given more channels than they make (image to video) have the latents in the first of them.
    """
    if len(shape) != latents.ndim:
        return None
    wrong = [axis for axis in range(latents.ndim) if shape[axis] != latents.shape[axis]]
    if not wrong:
        return latents
    if len(wrong) == 1 and wrong[0] > 0 and latents.shape[wrong[0]] > shape[wrong[0]]:
        return latents.narrow(wrong[0], 0, shape[wrong[0]])
    return None


def check_threshold(name: str, value: float) -> None:
    """Raises a ValueError unless it is a finite number from 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is a finite number from 0, where 0 never reuses; got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises a ValueError unless it is an int from ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is a whole number from {least}; got {value!r}")
