"""Running sums that torch's deterministic mode allows on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def running_sum(x: Tensor) -> Tensor:
    """The sum of all numbers up to each place along the last dimension, that place included.

    On CUDA `cumsum` of floating numbers may differ from run to run in its last bits, and raises under
    `torch.use_deterministic_algorithms(True)`; there the sums are taken in a fixed order instead.

    Args:
        x: Floating `[..., n]`.

    Returns:
        Shape and dtype of x.
    """
    if x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return sum_by_doubling(x)
    return x.cumsum(-1)


def sum_by_doubling(x: Tensor) -> Tensor:
    """`x.cumsum(-1)` in a fixed order: each round adds the place that is twice as far back as in the round before."""
    back = 1
    while back < x.shape[-1]:
        x = x + torch.nn.functional.pad(x[..., :-back], (back, 0))
        back *= 2
    return x
