"""Budgets of a schedule as numbers of blocks: what methods give to the rules that choose as many for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch


def block_counts(amount: int | float, blocks: int, factors: Sequence[float]) -> tuple[int, ...]:
    """How many blocks a row keeps under each factor: rounded up, at least one, at most all.

    Args:
        amount: the method's own budget: a part of all blocks (float) or their number (int).
        blocks: how many there are.
        factors: as from :meth:`dit_accel.processors.SparseAttnProcessor.budget_factors`.
    """
    own = amount if isinstance(amount, int) else amount * blocks
    return tuple(max(1, min(blocks, math.ceil(own * factor - 1e-9))) for factor in factors)


@lru_cache(maxsize=256)  # making one waits for the device; the same few come back at every step
def count_tensor(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The counts on a device, int64 ``[heads or 1, 1]``, which broadcasts to batch, heads and rows.

    A tensor, so that compiled code need not be made anew for another count.
    """
    with torch.inference_mode(False):  # so that it serves calls outside inference mode, too
        return torch.tensor(counts, dtype=torch.int64, device=device)[:, None]
