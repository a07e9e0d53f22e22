"""Attention over the mean keys of unlisted blocks, and its gradients, as dense products of torch.

One score per query and key block: a `1 / block_kv` of dense attention, so plain float32 products are good enough on
any device.  Scores are held in memory for some rows of blocks at a time.  Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backward import BackwardInputs, Gradients, score_gradient, softmax_delta, softmax_lse
from .merge import merge_attention
from .residual import Residual
from .sparse_plan import SparsePlan

# Scores held in memory at a time, in bytes, unless a single row of blocks has more.
_SCORE_BYTES = {"cpu": 8 << 20, "other": 256 << 20}


@dataclass(frozen=True, eq=False)
class Centroids:
    """A residual as attention reads it: keys, values and a bias on the scores.

    The number of keys is a bias `log n_j` rather than a factor on the weights: so no weight exceeds 1, and mean values
    fit into 16 bits where sums might not.

    Attributes:
        keys: `[B, H, NK, D]`.
        values: `[B, H, NK, D]`, mean value of each block.
        log_sizes: float32 `[NK]`, natural log of the keys per block.
    """

    keys: Tensor
    values: Tensor
    log_sizes: Tensor

    @classmethod
    def of(cls, residual: Residual, dtype: torch.dtype = torch.float32) -> Centroids:
        """Divides the summed values by the sizes, and rounds keys and values to `dtype`."""
        values = residual.v_sum / _divisor(residual)
        return cls(residual.k_mean.to(dtype), values.to(dtype), residual.sizes.log())


def add_residual(
    listed: tuple[Tensor, Tensor], q: Tensor, residual: Residual, plan: SparsePlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Merges attention over the listed blocks with that over the mean keys of all others.

    Args:
        listed: `(out, lse)` of the listed blocks, see `attend`.
        q: `[B, H, q_len, D]`.
        residual: Mean keys and summed values of all blocks.
        plan: The lists, in plan positions (`order` is the caller's business).
        scale: Factor on the scores.

    Returns:
        `(out, lse)` over both, shapes and dtypes of `listed`.
    """
    unlisted = centroid_attention(q, residual, plan, scale)
    out, lse = merge_attention((listed[0], unlisted[0]), (listed[1], unlisted[1]))
    return out.to(q.dtype), lse


def centroid_attention(q: Tensor, residual: Residual, plan: SparsePlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attends to the mean keys of the blocks that `plan` does not list.

    Args:
        q: `[B, H, q_len, D]`.
        residual: Mean keys and summed values of all blocks.
        plan: The lists, in plan positions.
        scale: Factor on the scores.

    Returns:
        `(out, lse)`, float32 `[B, H, q_len, D]` and `[B, H, q_len]`, natural log.  A query whose row lists every block
        gets out 0 and lse -inf.
    """
    centroids = Centroids.of(residual)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for part, listed in _strips(q, plan):
        scores = _scores(q[:, :, part].float(), centroids, listed, scale)
        lse[:, :, part] = scores.logsumexp(-1)
        weights = scores.sub_(softmax_lse(lse[:, :, part])[..., None]).exp_()
        out[:, :, part] = weights @ centroids.values
    return out, lse


def centroid_backward(inputs: BackwardInputs, residual: Residual, plan: SparsePlan, scale: float) -> Gradients:
    """Differentiates the part of the softmax that falls on mean keys.

    Args:
        inputs: Tensors of the forward pass and incoming gradients; out and lse are those over listed keys and mean
            keys together.
        residual: Mean keys and summed values of all blocks.
        plan: The lists, in plan positions.
        scale: Factor on the scores.

    Returns:
        `(grad_q, grad_k_mean, grad_v_sum)`, all float32: what the mean keys add to the gradient of q, and the
        gradients of `residual`.
    """
    centroids = Centroids.of(residual)
    delta = softmax_delta(inputs.out, inputs.lse, inputs.grad_out, inputs.grad_lse)
    grad_q = torch.zeros(inputs.q.shape, dtype=torch.float32, device=inputs.q.device)
    means = residual.k_mean, residual.v_sum
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in means)
    for part, listed in _strips(inputs.q, plan):
        q, grad_out = inputs.q[:, :, part].float(), inputs.grad_out[:, :, part].float()
        scores = _scores(q, centroids, listed, scale)
        weights, grad_scores = score_gradient(
            scores,
            softmax_lse(inputs.lse[:, :, part]),
            delta[:, :, part],
            grad_out @ centroids.values.transpose(-1, -2),
        )
        grad_q[:, :, part] = grad_scores @ centroids.keys * scale
        grad_k += grad_scores.transpose(-1, -2) @ q * scale
        grad_v += weights.transpose(-1, -2) @ grad_out
    return grad_q, grad_k, grad_v / _divisor(residual)


def rounded(residual: Residual, dtype: torch.dtype) -> Residual:
    """Rounds mean keys and values as a kernel that multiplies in `dtype` does, so that gradients fit its weights."""
    centroids = Centroids.of(residual, dtype)
    return replace(residual, k_mean=centroids.keys.float(), v_sum=centroids.values.float() * _divisor(residual))


def _divisor(residual: Residual) -> Tensor:
    """Sizes `[NK, 1]`, with 1 for blocks without keys, whose weight is 0 anyway."""
    return residual.sizes.masked_fill(residual.sizes == 0, 1.0)[:, None]


def _scores(q: Tensor, centroids: Centroids, listed: Tensor, scale: float) -> Tensor:
    """Float32 `[B, H, M, NK]`: scaled scores with their bias, -inf for listed blocks."""
    scores = (q @ centroids.keys.transpose(-1, -2)).mul_(scale).add_(centroids.log_sizes)
    return scores.masked_fill_(listed, float("-inf"))


def _strips(q: Tensor, plan: SparsePlan) -> Iterator[tuple[slice, Tensor]]:
    """Cuts the queries into strips; for each its place and which blocks are listed, bool `[B|1, H|1, M, NK]`."""
    listed = plan.to_bool()
    row_bytes = 4 * q.shape[0] * q.shape[1] * plan.block_q * plan.num_kv_blocks
    step = max(1, _SCORE_BYTES["cpu" if q.device.type == "cpu" else "other"] // row_bytes)
    for row in range(0, plan.num_q_blocks, step):
        part = slice(row * plan.block_q, min((row + step) * plan.block_q, plan.q_len))
        rows = listed[:, :, row : row + step].repeat_interleave(plan.block_q, 2)
        yield part, rows[:, :, : part.stop - part.start]
