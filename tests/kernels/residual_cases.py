"""Attention with a residual written out in float64, and cases that hold the Triton kernel against it.

interpreter_runner.py runs the cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.residual import Residual, block_residual
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

Triple = tuple[Tensor, Tensor, Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def tensors(batch: int, heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype = torch.float32) -> Triple:
    """Random q, k, v as transposed views of [batch, tokens, heads, dim] storage."""
    q, k, v = (torch.randn(batch, n, heads, dim).to(dtype).transpose(1, 2) for n in (q_len, kv_len, kv_len))
    return q, k, v


def random_plan(q_len: int, kv_len: int, block_q: int, block_kv: int, *lead: int, **rest: Any) -> SparsePlan:
    """A random plan; its second row of blocks is empty, its third one full where there are as many."""
    keep = torch.rand(*(lead or (1, 1)), -(-q_len // block_q), -(-kv_len // block_kv)) < 0.4
    keep[..., 1:2, :] = False
    keep[..., 2:3, :] = True
    return plan_from_blocks(keep, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, **rest)


def oracle(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in float64 over all keys and, behind them, all mean keys, under one mask; for autograd, too."""
    q, k, v = q.double(), k.double(), v.double()
    order = torch.arange(k.shape[2]) if plan.order is None else plan.order
    blocks = order.split(plan.block_kv)
    k_mean, v_mean = (torch.stack([x[:, :, block].mean(2) for block in blocks], 2) for x in (k, v))
    weights = torch.tensor([len(block) for block in blocks]).double().log()
    row_of_token = torch.arange(plan.q_len) // plan.block_q
    if plan.order is not None:
        row_of_token[plan.order] = row_of_token.clone()
    near = (q @ k.transpose(-1, -2) * scale).masked_fill(~plan.element_mask(), float("-inf"))
    far = q @ k_mean.transpose(-1, -2) * scale + weights
    far = far.masked_fill(plan.to_bool()[:, :, row_of_token], float("-inf"))
    scores = torch.cat((near, far), -1)
    return scores.softmax(-1) @ torch.cat((v, v_mean), 2), scores.logsumexp(-1)


def residual_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, backend: str, scale: float = 0.25
) -> tuple[Tensor, Tensor]:
    """attend with the residual of its own keys and values."""
    residual = block_residual(k, v, plan.block_kv, order=plan.order)
    return attend(q, k, v, plan, residual=residual, scale=scale, return_lse=True, backend=backend)


def check(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, backend: str, scale: float = 0.25) -> None:
    """Holds a backend against the oracle."""
    out, lse = residual_attention(q, k, v, plan, backend, scale)
    expected, expected_lse = oracle(q, k, v, plan, scale)
    tolerance = TOLERANCE[q.dtype]
    assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=tolerance)


def leaves_of(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """Detached copies that require gradients."""
    return q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()


def check_gradients(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, backend: str, scale: float = 0.25) -> None:
    """Holds the gradients of q, k and v, through the mean keys as well, against autograd through the oracle."""
    found, expected = leaves_of(q, k, v), leaves_of(q.double(), k.double(), v.double())
    cotangent = torch.randn_like(q), torch.randn(q.shape[:3])
    torch.autograd.backward(residual_attention(*found, plan, backend, scale), cotangent)
    torch.autograd.backward(oracle(*expected, plan, scale), [x.double() for x in cotangent])
    tolerance = GRADIENT_TOLERANCE[q.dtype]
    for leaf, truth in zip(found, expected, strict=True):
        assert leaf.grad is not None and truth.grad is not None and leaf.grad.dtype == q.dtype
        torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=tolerance, atol=tolerance)


def float32_odd_length_and_batch_of_three() -> None:
    check(*tensors(3, 2, 203, 203, 32), random_plan(203, 203, 64, 64, 3, 2), "triton")


def float16_more_blocks_than_one_group() -> None:
    check(*tensors(1, 2, 130, 1100, 64, torch.float16), random_plan(130, 1100, 64, 16), "triton")


def blocks_wider_than_tiles() -> None:
    check(*tensors(1, 1, 256, 300, 64, torch.float16), random_plan(256, 300, 128, 128), "triton")


def lists_per_batch() -> None:
    check(*tensors(2, 2, 150, 150, 32, torch.float16), random_plan(150, 150, 32, 32, 2, 1), "triton")


def padded_head_dims() -> None:
    for dim in (8, 40, 72, 160):
        check(*tensors(1, 1, 150, 150, dim, torch.float16), random_plan(150, 150, 32, 32), "triton")
    check(*tensors(1, 1, 100, 100, 160), random_plan(100, 100, 32, 32), "triton")


def order_of_tokens() -> None:
    plan = random_plan(200, 200, 32, 32, order=torch.randperm(200))
    check(*tensors(1, 2, 200, 200, 32), plan, "triton")


def band() -> None:
    test = Band(60, torch.tensor([60, 25, 10, -1, 0], dtype=torch.int32), 280, 20)
    plan = random_plan(300, 300, 64, 64, 1, 2, pair_test=test)
    assert (plan.full_counts < plan.counts).any()
    check(*tensors(1, 2, 300, 300, 32), plan, "triton")


def map_of_listed_blocks() -> None:
    from dit_accel.kernels.triton_kernels.centroids import listed_blocks

    for lead in ((1, 1), (2, 3)):
        plan = random_plan(100, 3000, 32, 16, *lead)
        assert plan.indices.shape[-1] > 128 and torch.equal(listed_blocks(plan) > 0, plan.to_bool())


def nothing_listed() -> None:
    keep = torch.zeros(4, 4, dtype=torch.bool)
    plan = plan_from_blocks(keep, q_len=100, kv_len=100, block_q=32, block_kv=32)
    check(*tensors(1, 2, 100, 100, 16), plan, "triton")


def everything_listed() -> None:
    q, k, v = tensors(1, 2, 100, 100, 16, torch.float16)
    plan = plan_from_blocks(torch.ones(4, 4) > 0, q_len=100, kv_len=100, block_q=32, block_kv=32)
    found = residual_attention(q, k, v, plan, "triton")
    expected = attend(q, k, v, plan, scale=0.25, return_lse=True, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def blocks_without_keys_count_nothing() -> None:
    q, k, v = tensors(1, 1, 64, 128, 16)
    plan = plan_from_blocks(torch.eye(2, 4) > 0, q_len=64, kv_len=128, block_q=32, block_kv=32)
    whole = block_residual(k, v, 32)
    sizes = torch.tensor([0.0, 0.0, 32.0, 0.0])
    found = attend(q, k, v, plan, residual=Residual(whole.k_mean, whole.v_sum, sizes), backend="triton")
    same = attend(
        q, k, v, plan, residual=Residual(whole.k_mean, whole.v_sum * sizes[:, None].sign(), sizes), backend="gather"
    )
    torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-5)


def other_softmax_and_schedule() -> None:
    from dit_accel.kernels.triton_kernels.forward import triton_attention
    from dit_accel.kernels.triton_kernels.options import KernelOptions

    q, k, v = tensors(1, 2, 150, 150, 32)
    plan = random_plan(150, 150, 32, 32, 1, 2)
    for softmax in ("lazy", "static"):
        for factor in (0.3, 3.0):
            found = triton_attention(
                q * factor, k, v, plan, 1.0, block_residual(k, v, 32), KernelOptions(True, softmax)
            )
            expected = oracle(q * factor, k, v, plan, 1.0)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


def gradients() -> None:
    check_gradients(*tensors(2, 2, 150, 150, 32), random_plan(150, 150, 32, 32, 2, 2), "triton")
    check_gradients(*tensors(1, 1, 100, 130, 16, torch.float16), random_plan(100, 130, 32, 16), "triton")


def means_by_the_kernel() -> None:
    _, k, v = tensors(2, 2, 8, 150, 40, torch.float16)
    order = torch.randperm(150)
    for given in (None, order):
        found, expected = (block_residual(k, v, 32, order=given, backend=b) for b in ("triton", "torch"))
        torch.testing.assert_close(found.k_mean, expected.k_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.v_sum, expected.v_sum, rtol=1e-5, atol=1e-5)


CASES: tuple[Callable[[], None], ...] = (
    float32_odd_length_and_batch_of_three,
    float16_more_blocks_than_one_group,
    blocks_wider_than_tiles,
    lists_per_batch,
    padded_head_dims,
    order_of_tokens,
    band,
    map_of_listed_blocks,
    nothing_listed,
    everything_listed,
    blocks_without_keys_count_nothing,
    other_softmax_and_schedule,
    gradients,
    means_by_the_kernel,
)
