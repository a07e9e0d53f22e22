"""Agent attention and pooling written straight from their formulas, in float64: the definition for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def agent_attention(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, scale: float, second_scale_power: float, shortcut: float
) -> Tensor:
    """`softmax(Q Aᵀ scale^power) softmax(A Kᵀ scale) V + shortcut V`; shapes as in the fast version.

    Returns:
        float64 `[B, H, q_len, D]`.
    """
    q, k, v, agents = (tensor.double() for tensor in (q, k, v, agents))
    gathered = (agents @ k.transpose(-1, -2) * scale).softmax(-1) @ v
    out = (q @ agents.transpose(-1, -2) * scale**second_scale_power).softmax(-1) @ gathered
    return out + shortcut * v if shortcut else out


def pooled_agents(q: Tensor, grid: tuple[int, int, int], cells: tuple[int, int, int], start: int = 0) -> Tensor:
    """The mean query of each cell, cell by cell.

    Args:
        q: `[B, H, tokens, D]`.
        grid: Video tokens along (frames, height, width).
        cells: Agents along the same axes.
        start: The first video token.

    Returns:
        float64 `[B, H, product of cells, D]`.
    """
    video = q[:, :, start : start + math.prod(grid)].double().unflatten(2, grid)
    pooled = []
    for place in torch.cartesian_prod(*(torch.arange(count) for count in cells)).tolist():
        box = video
        for axis, (i, length, count) in enumerate(zip(place, grid, cells, strict=True)):
            low, high = math.floor(i * length / count), math.ceil((i + 1) * length / count)
            box = box.narrow(2 + axis, low, high - low)
        pooled.append(box.mean((2, 3, 4)))
    return torch.stack(pooled, 2)


def agent_attention_beside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    exact_k: Tensor,
    exact_v: Tensor,
    *,
    scale: float,
    second_scale_power: float,
    shortcut: float,
) -> Tensor:
    """Keys through agents and exact keys in one softmax; shapes as in the fast version.

    Returns:
        float64 `[B, H, N, D]`.
    """
    q, k, v, agents, exact_k, exact_v = (tensor.double() for tensor in (q, k, v, agents, exact_k, exact_v))
    gathering = agents @ k.transpose(-1, -2) * scale
    weights = (q @ agents.transpose(-1, -2) * scale**second_scale_power).softmax(-1)
    through = weights @ (gathering.softmax(-1) @ v)
    mass = (weights @ gathering.logsumexp(-1, keepdim=True)).exp()
    direct = (q @ exact_k.transpose(-1, -2) * scale).exp()
    return (mass * through + direct @ exact_v) / (mass + direct.sum(-1, keepdim=True)) + shortcut * v
