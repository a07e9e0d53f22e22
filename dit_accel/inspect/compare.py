"""What a plan loses, head by head: softmax mass that it leaves out, and the error of its output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.attend import attend
from ..kernels.residual import block_residual
from ..kernels.sparse_plan import SparsePlan
from .statistics import CHUNK

TINY = 1e-30


class Dense(NamedTuple):
    """Dense attention of one call.

    Attributes:
        output: float32 ``[batch, heads, tokens, head_dim]``.
        lse: float32 ``[batch, heads, tokens]``, log-sum-exp of the scaled scores.
    """

    output: Tensor
    lse: Tensor


class Quality(NamedTuple):
    """What a plan does to the heads of a call; float32 ``[heads]`` each, over batch and queries.

    Attributes:
        recall: mean share of a query's softmax mass that the plan keeps.
        error: norm of the difference from the dense output, relative to the norm of that.
        density: kept pairs over all pairs.
    """

    recall: Tensor
    error: Tensor
    density: Tensor


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Dense:
    """Plain softmax attention with the usual scale, some queries at a time.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key: likewise.
        value: likewise.
    """
    query, keys, value = query.float(), key.float().transpose(-1, -2), value.float()
    batch, heads, _, head_dim = query.shape
    rows = max(1, CHUNK // (batch * heads * key.shape[2]))
    outputs, sums = [], []
    for part in query.split(rows, 2):
        scores = part @ keys * head_dim**-0.5
        lse = scores.logsumexp(-1, keepdim=True)
        outputs.append((scores - lse).exp() @ value)
        sums.append(lse[..., 0])
    return Dense(torch.cat(outputs, 2), torch.cat(sums, 2))


def relative_error(output: Tensor, dense: Tensor) -> Tensor:
    """``||output - dense|| / ||dense||`` of each head, with norms over batch, tokens and channels: ``[heads]``."""
    lost, whole = ((x.float() ** 2).sum((0, 2, 3)).sqrt() for x in (output.float() - dense.float(), dense))
    return lost / whole.clamp_min(TINY)


def quality(
    query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, dense: Dense, compensate: bool = False
) -> Quality:
    """Runs a plan in float32 and compares it with dense attention.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key: likewise.
        value: likewise.
        plan: with its density counted.
        dense: of the same call.
        compensate: whether what the plan leaves out counts by the means of its blocks; the recall is without that.
    """
    query, key, value = query.float(), key.float(), value.float()
    output, lse = attend(query, key, value, plan, return_lse=True)
    if compensate:
        residual = block_residual(key, value, plan.block_kv, order=plan.key_order)
        output = attend(query, key, value, plan, residual=residual)
    density = torch.tensor(plan.stats.density_per_head, dtype=torch.float32, device=query.device)
    recall = (lse - dense.lse).exp().mean((0, 2)).clamp(max=1)
    return Quality(recall, relative_error(output, dense.output), density.expand(query.shape[1]))
