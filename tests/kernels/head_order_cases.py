"""Plans whose heads order their tokens each in its own way, dense answers for them, and cases for the Triton kernels.

interpreter_runner.py runs the cases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.bitmap import Bitmap
from dit_accel.kernels.residual import block_residual
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

Triple = tuple[Tensor, Tensor, Tensor]
BLOCK_Q, BLOCK_KV = 16, 32


def tensors(batch: int, heads: int, q_len: int, kv_len: int, dim: int = 16) -> Triple:
    """Random q, k, v as transposed views of [batch, tokens, heads, dim] storage."""
    q, k, v = (torch.randn(batch, n, heads, dim).transpose(1, 2) for n in (q_len, kv_len, kv_len))
    return q, k, v


def orders(tokens: int, *lead: int) -> Tensor:
    """A random order for each entry of `lead`; one order if there is none."""
    return torch.rand(*lead, tokens).argsort(-1)


def random_plan(q_len: int, kv_len: int, *lead: int, **rest: Any) -> SparsePlan:
    """Random blocks of 16 queries and 32 keys; nobody's row is empty but the second one."""
    keep = torch.rand(*(lead or (1, 1)), -(-q_len // BLOCK_Q), -(-kv_len // BLOCK_KV)) < 0.5
    keep[..., 0] = True
    keep[..., 1, :] = False
    return plan_from_blocks(keep, q_len=q_len, kv_len=kv_len, block_q=BLOCK_Q, block_kv=BLOCK_KV, **rest)


def bitmap(q_len: int, kv_len: int, *lead: int) -> Bitmap:
    """A random element test."""
    return Bitmap.from_mask(torch.rand(*lead, q_len, kv_len) < 0.7, block_q=BLOCK_Q, block_kv=BLOCK_KV)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float = 0.25) -> tuple[Tensor, Tensor]:
    """Masked softmax attention and its log-sum-exp, for autograd; queries without keys get 0 and -inf."""
    some = mask.any(-1, keepdim=True)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    lse = scores.masked_fill(~some, 0.0).logsumexp(-1).masked_fill(~some[..., 0], float("-inf"))
    return (scores.masked_fill(~some, 0.0).softmax(-1) * mask) @ v, lse


def compare_triton(plan: SparsePlan, *, compensate: bool = False) -> None:
    """The kernels, forward and backward, against the reference backend."""
    q, k, v = (x.requires_grad_() for x in tensors(2, 2, plan.q_len, plan.kv_len))
    grad = torch.randn(q.shape)
    found = []
    for backend in ("triton", "reference"):
        residual = block_residual(k, v, BLOCK_KV, order=plan.key_order) if compensate else None
        out, lse = attend(q, k, v, plan, residual=residual, return_lse=True, backend=backend)
        found.append((out, lse, *torch.autograd.grad(out, (q, k, v), grad)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def an_order_for_each_head() -> None:
    compare_triton(random_plan(70, 70, 2, 2, order=orders(70, 2, 2)))


def keys_in_another_order_with_residual() -> None:
    plan = random_plan(40, 70, 2, 2, order=orders(40, 1, 2), kv_order=orders(70, 2, 2))
    compare_triton(plan, compensate=True)


CASES = (an_order_for_each_head, keys_in_another_order_with_residual)
