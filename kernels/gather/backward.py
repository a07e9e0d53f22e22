"""Gradients of the gather backend: the listed key blocks of each row are gathered once more, for plain products.

Rows with equally many blocks are stacked, as in the forward pass.  Each stack yields its queries' gradients at once;
those of keys and values are added up block by block, always in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backward import BackwardInputs, Gradients, score_gradient, softmax_delta, softmax_lse
from ..sparse_plan import SparsePlan
from .forward import _row_mask, cut_rows

# Scores, weights, their gradients and a temporary of one stack, in bytes: small enough for the CPU caches to help.
_STACK_BYTES = {"cpu": 32 << 20, "other": 512 << 20}


@dataclass(frozen=True, eq=False)
class _Blocked:
    """Inputs and gradients cut into plan blocks; the leading axis runs over (batch, head, block)."""

    q: Tensor  # [B*H*NQ, block_q, D]
    k: Tensor  # [B*H*NK, block_kv, D]
    v: Tensor  # [B*H*NK, block_kv, D]
    grad_out: Tensor  # [B*H*NQ, block_q, D]
    lse: Tensor  # [B*H*NQ, block_q], +inf for queries without keys and behind the end
    delta: Tensor  # [B*H*NQ, block_q]
    grad_q: Tensor  # [B*H*NQ, block_q, D], like all gradients float32
    grad_k: Tensor  # [B*H*NK, block_kv, D]
    grad_v: Tensor  # [B*H*NK, block_kv, D]


@dataclass(frozen=True, eq=False)
class _Stack:
    """Rows with equally many blocks, and under the same element mask if there is one."""

    rows: Tensor  # int64 [n], (batch, head, query block)
    blocks: Tensor  # int64 [n, count], (batch, head, key block)
    hidden: Tensor | None  # bool, broadcastable to [n, block_q, count * block_kv]


def gather_backward(inputs: BackwardInputs, plan: SparsePlan, scale: float) -> Gradients:
    """Computes the gradients of `gather_attention`; bit for bit the same every time.

    Args:
        inputs: Tensors of the forward pass and incoming gradients.
        plan: Who attends to whom, in plan positions (`order` is the caller's business).
        scale: Factor on the scores.

    Returns:
        `(grad_q, grad_k, grad_v)` in the dtypes and shapes of q, k and v; undefined where not asked for.
    """
    batch, heads = inputs.q.shape[:2]
    data = _blocked(inputs, plan)
    for stack in _stacks(plan, batch, heads):
        _add_stack(stack, data, inputs, scale)
    grads = (data.grad_q, inputs.q), (data.grad_k, inputs.k), (data.grad_v, inputs.v)
    grad_q, grad_k, grad_v = (_joined(grad, like) for grad, like in grads)
    return grad_q, grad_k, grad_v


def _blocked(inputs: BackwardInputs, plan: SparsePlan) -> _Blocked:
    delta = softmax_delta(inputs.out, inputs.lse, inputs.grad_out, inputs.grad_lse)
    q, k = _cut(inputs.q, plan.block_q), _cut(inputs.k, plan.block_kv)
    return _Blocked(
        q=q,
        k=k,
        v=_cut(inputs.v, plan.block_kv),
        grad_out=_cut(inputs.grad_out, plan.block_q),
        lse=_cut(softmax_lse(inputs.lse)[..., None], plan.block_q, float("inf"))[..., 0],
        delta=_cut(delta[..., None], plan.block_q)[..., 0],
        grad_q=torch.zeros_like(q, dtype=torch.float32),
        grad_k=torch.zeros_like(k, dtype=torch.float32),
        grad_v=torch.zeros_like(k, dtype=torch.float32),
    )


def _cut(x: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """Copies `[B, H, S, D]` to a contiguous `[B * H * blocks, block, D]`, `fill` behind the end."""
    short = -x.shape[2] % block
    padded = F.pad(x, (0, 0, 0, short), value=fill) if short else x.contiguous()
    return padded.reshape(-1, block, x.shape[3])


def _joined(grad: Tensor, like: Tensor) -> Tensor:
    whole = grad.view(*like.shape[:2], -1, like.shape[3])
    # A copy of the size of `like`, so that nobody keeps the padded float32 buffer alive.
    return whole[:, :, : like.shape[2]].to(like.dtype).contiguous()


def _stacks(plan: SparsePlan, batch: int, heads: int) -> Iterator[_Stack]:
    counts = plan.counts.expand(batch, heads, -1).reshape(-1)
    whole = counts
    if plan.pair_test is not None:
        full = plan.full_counts.expand(batch, heads, -1).reshape(-1)
        whole = torch.where(full == counts, counts, 0)
    indices = plan.indices.expand(batch, heads, -1, -1).reshape(counts.numel(), -1)
    for count in whole.unique().tolist():
        if count:
            yield from _whole_stacks((whole == count).nonzero()[:, 0], count, indices, plan)
    if plan.pair_test is not None:
        yield from _cut_stacks(plan, batch, heads)


def _whole_stacks(members: Tensor, count: int, indices: Tensor, plan: SparsePlan) -> Iterator[_Stack]:
    tail = plan.kv_len % plan.block_kv
    behind = torch.arange(plan.block_kv, device=members.device) >= tail
    for rows in members.split(_rows_per_stack(count, plan)):
        listed = indices[rows, :count].long()
        hidden = ((listed == plan.num_kv_blocks - 1)[..., None] & behind).view(len(rows), 1, -1) if tail else None
        owner = torch.div(rows, plan.num_q_blocks, rounding_mode="floor")
        yield _Stack(rows, listed + owner[:, None] * plan.num_kv_blocks, hidden)


def _cut_stacks(plan: SparsePlan, batch: int, heads: int) -> Iterator[_Stack]:
    """Rows with PARTIAL blocks.  A mask is built once per plan row and used by all heads that share it."""
    plan_batch, plan_heads = plan.counts.shape[:2]
    grid = torch.arange(batch * heads, device=plan.device).view(batch, heads)
    for b, h, row, count, full in cut_rows(plan):
        listed = plan.indices[b, h, row, :count].long()
        hidden = ~_row_mask(plan, (b, h, row), listed, full)
        owners = grid if plan_batch == 1 else grid[b : b + 1]
        owners = owners if plan_heads == 1 else owners[:, h : h + 1]
        for some in owners.reshape(-1).split(_rows_per_stack(count, plan)):
            yield _Stack(some * plan.num_q_blocks + row, listed + some[:, None] * plan.num_kv_blocks, hidden)


def _rows_per_stack(count: int, plan: SparsePlan) -> int:
    scores = plan.block_q * count * plan.block_kv
    return max(1, _STACK_BYTES["cpu" if plan.device.type == "cpu" else "other"] // (4 * 4 * scores))


def _add_stack(stack: _Stack, data: _Blocked, inputs: BackwardInputs, scale: float) -> None:
    rows, blocks, dim = stack.rows, stack.blocks.reshape(-1), data.q.shape[-1]
    q, grad_out = (t.index_select(0, rows).float() for t in (data.q, data.grad_out))
    k, v = (t.index_select(0, blocks).view(len(rows), -1, dim).float() for t in (data.k, data.v))
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    if stack.hidden is not None:
        scores.masked_fill_(stack.hidden, float("-inf"))
    grad_weights = torch.bmm(grad_out, v.transpose(1, 2))
    weights, grad_scores = score_gradient(scores, data.lse[rows], data.delta[rows], grad_weights)
    if inputs.need_q:
        data.grad_q.index_copy_(0, rows, torch.bmm(grad_scores, k).mul_(scale))
    if inputs.need_kv:
        _add_blocks(data.grad_k, blocks, torch.bmm(grad_scores.transpose(1, 2), q).mul_(scale))
        _add_blocks(data.grad_v, blocks, torch.bmm(weights.transpose(1, 2), grad_out))


def _add_blocks(total: Tensor, blocks: Tensor, values: Tensor) -> None:
    """Adds `values`, one block per entry of `blocks`, which may repeat; in a fixed order on every device."""
    values = values.view(-1, *total.shape[1:])
    if total.device.type == "cpu":
        total.index_add_(0, blocks, values)
    else:
        # index_add_ races on a GPU; accumulating index_put_ sorts first.
        total.index_put_((blocks,), values, accumulate=True)
