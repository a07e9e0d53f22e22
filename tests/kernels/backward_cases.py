"""Gradients by autograd through dense attention, and cases that hold the Triton backward kernels against them.

interpreter_runner.py runs the cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

Triple = tuple[Tensor, Tensor, Tensor]
# Cotangents of order one through 16-bit weights, outputs and score gradients.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def tensors(batch: int, heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype = torch.float32) -> Triple:
    """Random q, k, v as transposed views of [batch, tokens, heads, dim] storage."""
    q, k, v = (torch.randn(batch, n, heads, dim).to(dtype).transpose(1, 2) for n in (q_len, kv_len, kv_len))
    return q, k, v


def leaves_of(*tensors: Tensor) -> Triple:
    """Detached copies that require gradients."""
    q, k, v = (t.detach().requires_grad_() for t in tensors)
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, backend: str, scale: float) -> tuple[Tensor, Tensor]:
    """attend with log-sum-exp."""
    return attend(q, k, v, plan, scale=scale, return_lse=True, backend=backend)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in float64 for autograd, without code of the package; lse 0 for queries without keys."""
    some = mask.any(-1, keepdim=True)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf")).masked_fill(~some, 0.0)
    return (scores.softmax(-1) * mask) @ v, (scores.logsumexp(-1) * some[..., 0])


def cotangents(q: Tensor) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse, the former with the strides of a transposed view."""
    batch, heads, tokens, dim = q.shape
    return torch.randn(batch, tokens, heads, dim).to(q.dtype).transpose(1, 2), torch.randn(batch, heads, tokens)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, backend: str, grad_out: Tensor, grad_lse: Tensor, scale: float
) -> Triple:
    """Gradients of q, k and v through one backend."""
    leaves = leaves_of(q, k, v)
    outputs = attention(*leaves, plan, backend, scale)
    grad_q, grad_k, grad_v = torch.autograd.grad(outputs, leaves, (grad_out, grad_lse))
    return grad_q, grad_k, grad_v


def expected_gradients(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, grad_out: Tensor, grad_lse: Tensor, scale: float
) -> Triple:
    """The same by autograd through the oracle."""
    leaves = leaves_of(q.double(), k.double(), v.double())
    outputs = oracle(*leaves, plan.element_mask(), scale)
    grad_q, grad_k, grad_v = torch.autograd.grad(outputs, leaves, (grad_out.double(), grad_lse.double()))
    return grad_q, grad_k, grad_v


def check_gradients(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, backend: str, scale: float = 0.25, rtol: float | None = None
) -> None:
    """Holds the gradients of a backend against the oracle's."""
    cotangent = cotangents(q)
    found = gradients(q, k, v, plan, backend, *cotangent, scale)
    expected = expected_gradients(q, k, v, plan, *cotangent, scale)
    tolerance = TOLERANCE[q.dtype] if rtol is None else rtol
    for grad, truth, leaf in zip(found, expected, (q, k, v), strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
        torch.testing.assert_close(grad.double(), truth, rtol=tolerance, atol=tolerance)


def check_empty_queries(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, backend: str) -> None:
    """Checks that queries without keys get gradient 0 and give none, even if NaN arrives at their lse of -inf."""
    check_gradients(q, k, v, plan, backend)
    grad_out, grad_lse = cotangents(q)
    some = plan.element_mask().any(-1).expand_as(grad_lse)
    assert not some.all()
    expected = gradients(q, k, v, plan, backend, grad_out, grad_lse, 0.25)
    found = gradients(q, k, v, plan, backend, grad_out, grad_lse.masked_fill(~some, float("nan")), 0.25)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0][~some].eq(0).all()


def random_plan(q_len: int, kv_len: int, block_q: int, block_kv: int, *lead: int, **rest: Any) -> SparsePlan:
    """A random plan; its second row of blocks is empty where there is one."""
    keep = torch.rand(*(lead or (1, 1)), -(-q_len // block_q), -(-kv_len // block_kv)) < 0.6
    keep[..., 0, 0] = True
    keep[..., 1:2, :] = False
    return plan_from_blocks(keep, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, **rest)


def check(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, **options: Any) -> None:
    """Holds the kernels against autograd through the dense oracle."""
    check_gradients(q, k, v, plan, "triton", **options)


def float32_odd_length() -> None:
    check(*tensors(1, 2, 150, 150, 32), random_plan(150, 150, 64, 64, 1, 2))


def batch_of_three_with_own_lists() -> None:
    check(*tensors(3, 2, 100, 100, 16), random_plan(100, 100, 32, 32, 3, 2))


def lists_per_batch() -> None:
    check(*tensors(2, 2, 100, 70, 16), random_plan(100, 70, 32, 16, 2, 1))


def blocks_wider_than_tiles() -> None:
    check(*tensors(1, 1, 128, 200, 16), random_plan(128, 200, 128, 64))
    check(*tensors(1, 1, 200, 128, 16), random_plan(200, 128, 64, 128))


def unusual_blocks() -> None:
    check(*tensors(1, 1, 100, 100, 16), random_plan(100, 100, 32, 48))


def head_dims() -> None:
    for dim in (8, 40, 64, 72, 128, 160):
        check(*tensors(1, 1, 40, 40, dim), random_plan(40, 40, 16, 16))


def float16() -> None:
    check(*tensors(1, 2, 150, 150, 64, torch.float16), random_plan(150, 150, 64, 64))
    check(*tensors(1, 1, 256, 256, 128, torch.float16), random_plan(256, 256, 128, 128))


def _band(video: int) -> Band:
    return Band(40, torch.tensor([40, 15, 6, -1, 0], dtype=torch.int32), video, 10)


def band() -> None:
    plan = random_plan(200, 200, 32, 32, 1, 2, pair_test=_band(200))
    assert (plan.full_counts < plan.counts).any() and (plan.full_counts > 0).any()
    check(*tensors(2, 2, 200, 200, 16), plan)


def band_with_text_and_short_tails() -> None:
    keep = torch.rand(3, 6) < 0.8
    keep[:, -1] = True
    partial = keep & (torch.arange(6) < 5)
    plan = plan_from_blocks(
        keep, partial=partial, pair_test=_band(170), q_len=190, kv_len=190, block_q=64, block_kv=32
    )
    check(*tensors(1, 2, 190, 190, 16), plan)


def queries_that_the_band_leaves_without_keys() -> None:
    widths = torch.tensor([-1, 5, -1], dtype=torch.int32)
    keep = torch.eye(3, dtype=torch.bool)
    keep[0, 1] = True
    sizes: dict[str, Any] = {"q_len": 96, "kv_len": 96, "block_q": 32, "block_kv": 32}
    plan = plan_from_blocks(keep, partial=keep, pair_test=Band(32, widths, 96), **sizes)
    check_empty_queries(*tensors(1, 1, 96, 96, 16), plan, "triton")


def strided_views() -> None:
    q, k, v = torch.randn(2, 70, 3, 2, 16).permute(2, 0, 3, 1, 4)
    check(q, k, v, random_plan(70, 70, 32, 32))


def large_scores() -> None:
    q, k, v = tensors(1, 1, 70, 70, 16)
    check(q * 8, k * 8, v, random_plan(70, 70, 32, 32), rtol=1e-3)


def scale_and_lengths() -> None:
    check(*tensors(1, 1, 1, 70, 16), random_plan(1, 70, 32, 32), scale=0.9)
    check(*tensors(1, 1, 70, 1, 16), random_plan(70, 1, 32, 32), scale=0.02)


def same_bits_every_time() -> None:
    q, k, v = tensors(1, 2, 100, 100, 16)
    plan = random_plan(100, 100, 32, 32)
    cotangent = cotangents(q)
    first, second = (gradients(q, k, v, plan, "triton", *cotangent, 0.25) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


CASES: tuple[Callable[[], None], ...] = (
    float32_odd_length,
    batch_of_three_with_own_lists,
    lists_per_batch,
    blocks_wider_than_tiles,
    unusual_blocks,
    head_dims,
    float16,
    band,
    band_with_text_and_short_tails,
    queries_that_the_band_leaves_without_keys,
    strided_views,
    large_scores,
    scale_and_lengths,
    same_bits_every_time,
)
