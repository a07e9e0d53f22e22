"""Otsu's threshold: splits numbers into two groups that lie as far apart as they can."""

from __future__ import annotations

import torch
from torch import Tensor


def otsu_mask(values: Tensor) -> Tensor:
    """Which values belong to the upper of two groups (Otsu 1979), exactly, without a histogram.

    Of all splits between different neighbors in rising order the one with the greatest variance between the groups,
    ``w0 * w1 * (m0 - m1)^2``, is taken; the lowest of several.

    Args:
        values: ``[..., count]``; each row is split by itself.

    Returns:
        bool, of the same shape; rows of equal values have no upper group and are all False.
    """
    exact = values.detach().cpu().double()  # some devices have no float64
    rising, count = exact.sort(-1).values, exact.shape[-1]
    if count < 2:
        return torch.zeros_like(values, dtype=torch.bool)
    sums, lower = rising.cumsum(-1), torch.arange(1, count)
    below, above = sums[..., :-1] / lower, (sums[..., -1:] - sums[..., :-1]) / (count - lower)
    between = lower * (count - lower) * (above - below) ** 2
    is_split = rising[..., 1:] > rising[..., :-1]
    best = between.masked_fill(~is_split, -1).argmax(-1, keepdim=True)
    upper = (exact > rising.gather(-1, best)) & is_split.any(-1, keepdim=True)
    return upper.to(values.device)
