"""What a map of block masses says: how much the heaviest blocks hold, and how many are needed for a part of it all."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

FEWEST_BLOCKS = 10  # with fewer a tenth is no whole block, and the recall means nothing


def recall_at(mass: Tensor, densities: tuple[float, ...]) -> Tensor:
    """Mass in the heaviest blocks of each row, with a fraction of a block where that is no whole number.

    Args:
        mass: ``[batch, heads, query blocks, key blocks]``, rows that sum to 1.
        densities: parts of the key blocks, in [0, 1].

    Returns:
        float32 ``[heads, densities]``, means over batch and rows; the densities themselves if attention is uniform.
    """
    reached = _reached(mass)
    found = [_at(reached, density * mass.shape[-1]).mean((0, 2)) for density in densities]
    return torch.stack(found, -1)


def density_for(mass: Tensor, level: float) -> Tensor:
    """The least part of the key blocks that holds a part of the mass: float32 ``[heads]``, as :func:`recall_at`."""
    return (_first(_reached(mass), level) / mass.shape[-1]).mean((0, 2))


def coarser(mass: Tensor, tokens: int, block: int, factor: int) -> Tensor:
    """The map for blocks ``factor`` times as long.

    Args:
        mass: ``[batch, heads, query blocks, key blocks]``.
        tokens: in all blocks together, of queries and of keys.
        block: tokens per block of ``mass``; the last may be short.
        factor: whole number from 1.
    """
    sizes = (tokens - block * torch.arange(mass.shape[2], device=mass.device)).clamp(max=block).to(mass.dtype)
    rows = _sum_runs((mass * sizes[:, None]).transpose(-1, -2), factor) / _sum_runs(sizes, factor)
    return _sum_runs(rows.transpose(-1, -2), factor)


def _sum_runs(values: Tensor, run: int) -> Tensor:
    return functional.pad(values, (0, -values.shape[-1] % run)).unflatten(-1, (-1, run)).sum(-1)


def _reached(mass: Tensor) -> Tensor:
    ordered = mass.sort(-1, descending=True).values.cumsum(-1)
    return functional.pad(ordered, (1, 0)).contiguous()


def _at(reached: Tensor, position: float) -> Tensor:
    """The value of a cumulative sum after ``position`` steps, between steps on a straight line."""
    low = math.floor(position + 1e-9)
    high = min(low + 1, reached.shape[-1] - 1)
    return torch.lerp(reached[..., low], reached[..., high], max(0.0, position - low))


def _first(reached: Tensor, level: float) -> Tensor:
    """After how many steps a cumulative sum reaches a level, between steps on a straight line."""
    levels = torch.full_like(reached[..., :1], level)
    high = torch.searchsorted(reached, levels).clamp(1, reached.shape[-1] - 1)
    below, above = reached.gather(-1, high - 1), reached.gather(-1, high)
    return (high - 1 + (levels - below) / (above - below))[..., 0]
