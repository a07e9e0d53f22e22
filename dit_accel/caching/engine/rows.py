"""Batches that hold both branches of guidance: the unconditional rows first, the conditional ones behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def holds_both_branches(latents: Tensor, is_guided: bool | None) -> bool:
    """Whether a batch holds the same latents twice, as guidance does; waits for the device.

    Args:
        latents: ``[batch, ...]``.
        is_guided: what the pipeline says about guidance; None if it says nothing.
    """
    if is_guided is False or len(latents) % 2 or not len(latents):
        return False
    first, second = latents.chunk(2)
    return torch.equal(first, second)


def second_half(tree: Any, batch: int) -> Any:
    """The second half of every tensor with ``batch`` rows, in any nest of lists, tuples and mappings."""
    return pytree.tree_map_only(
        Tensor, lambda part: part[batch // 2 :] if part.ndim and len(part) == batch else part, tree
    )
