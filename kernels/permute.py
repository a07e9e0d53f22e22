"""Tokens into the order of a plan and back, where all heads share an order or each has its own."""

from __future__ import annotations

import torch
from torch import Tensor


def permuted(x: Tensor, order: Tensor | None) -> Tensor:
    """Puts tokens into the order of a plan.  Differentiable in x.

    Args:
        x: `[B, H, N, ...]`, any strides.
        order: int64 `[N]` or `[B|1, H|1, N]`: position p gets token `order[..., p]`.  None: x as it is.

    Returns:
        Shape of x.
    """
    if order is None:
        return x
    return x.index_select(2, order) if order.ndim == 1 else x[_places(x, order)]


def put_back(x: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `permuted`: token `order[..., p]` gets what stands at position p.  Differentiable in x.

    Args:
        x: `[B, H, N, ...]`.
        order: As there.

    Returns:
        Shape of x.
    """
    if order is None:
        return x
    out = torch.empty_like(x)  # all of it is written
    return out.index_copy_(2, order, x) if order.ndim == 1 else out.index_put_(_places(x, order), x)


def inverse_order(order: Tensor) -> Tensor:
    """Where each token is: `inverse_order(order)[order[p]] == p`, in every row.

    Args:
        order: A permutation, int64 `[N]`, or one in each row of `[..., N]`.

    Returns:
        int64, shape of `order`.
    """
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def _places(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return batch[:, None, None], heads[:, None], order
