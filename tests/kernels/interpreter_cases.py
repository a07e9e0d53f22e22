"""Cases that hold the Triton kernel against the reference backend; interpreter_runner.py runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.attend import attend, choose_backend, explain
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

Triple = tuple[Tensor, Tensor, Tensor]


def tensors(batch: int, heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype) -> Triple:
    """Random q, k, v as transposed views of [batch, tokens, heads, dim] storage."""
    q, k, v = (torch.randn(batch, n, heads, dim).to(dtype).transpose(1, 2) for n in (q_len, kv_len, kv_len))
    return q, k, v


def random_plan(q_len: int, kv_len: int, block_q: int, block_kv: int, *lead: int, **rest: Any) -> SparsePlan:
    """A random plan; its second row of blocks is empty where there is one."""
    keep = torch.rand(*(lead or (1, 1)), -(-q_len // block_q), -(-kv_len // block_kv)) < 0.6
    keep[..., 0, -1] = True
    keep[..., 1:2, :] = False
    return plan_from_blocks(keep, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, **rest)


def compare(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, **options: Any) -> None:
    """Holds the kernel against the reference backend."""
    out, lse = attend(q, k, v, plan, return_lse=True, backend="triton", **options)
    expected, expected_lse = attend(q, k, v, plan, return_lse=True, backend="reference", **options)
    tolerance = 1e-5 if q.dtype == torch.float32 else 3e-3
    assert out.shape == q.shape and out.dtype == q.dtype
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=max(1e-5, tolerance / 3))


def float32_odd_length() -> None:
    compare(*tensors(1, 2, 333, 333, 64, torch.float32), random_plan(333, 333, 64, 64, 1, 2))


def float16_blocks_wider_than_tiles() -> None:
    compare(*tensors(1, 1, 256, 300, 64, torch.float16), random_plan(256, 300, 128, 128))


def blocks_of_64() -> None:
    compare(*tensors(1, 1, 192, 192, 64, torch.float16), random_plan(192, 192, 64, 64))


def unusual_blocks() -> None:
    compare(*tensors(1, 1, 100, 100, 16, torch.float16), random_plan(100, 100, 32, 48))


def lists_per_batch_and_head() -> None:
    compare(*tensors(3, 2, 150, 150, 32, torch.float16), random_plan(150, 150, 64, 64, 3, 2))


def lists_per_batch() -> None:
    compare(*tensors(2, 2, 150, 150, 32, torch.float16), random_plan(150, 150, 64, 64, 2, 1))


def _band(video: int) -> Band:
    return Band(60, torch.tensor([60, 25, 10, -1, 0], dtype=torch.int32), video, 20)


def band() -> None:
    plan = random_plan(300, 300, 64, 64, 1, 2, pair_test=_band(300))
    assert (plan.full_counts < plan.counts).any() and (plan.full_counts > 0).any()
    compare(*tensors(2, 2, 300, 300, 32, torch.float32), plan)


def band_with_text_and_full_tail() -> None:
    keep = torch.rand(3, 5) < 0.8
    keep[:, -1] = True
    partial = keep & (torch.arange(5) < 4)
    plan = plan_from_blocks(
        keep, partial=partial, pair_test=_band(270), q_len=300, kv_len=300, block_q=128, block_kv=64
    )
    compare(*tensors(1, 2, 300, 300, 32, torch.float16), plan)


def band_without_text_on_whole_blocks() -> None:
    plan = random_plan(256, 256, 64, 64, pair_test=Band(64, torch.tensor([9, 3, -1, 0], dtype=torch.int32), 256))
    compare(*tensors(1, 1, 256, 256, 32, torch.float16), plan)


def band_of_one_frame() -> None:
    plan = random_plan(128, 128, 64, 64, pair_test=Band(128, torch.tensor([30], dtype=torch.int32), 128))
    compare(*tensors(1, 1, 128, 128, 16, torch.float16), plan)


def order_of_tokens() -> None:
    compare(*tensors(1, 1, 200, 200, 32, torch.float16), random_plan(200, 200, 64, 64, order=torch.randperm(200)))


def padded_head_dims() -> None:
    for dim in (8, 40, 72, 80, 96, 160, 256):
        compare(*tensors(1, 1, 70, 70, dim, torch.float16), random_plan(70, 70, 64, 64))
    compare(*tensors(1, 1, 40, 40, 160, torch.float32), random_plan(40, 40, 64, 64))


def fused_projection_views() -> None:
    q, k, v = torch.randn(2, 150, 3, 2, 32).half().permute(2, 0, 3, 1, 4)
    compare(q, k, v, random_plan(150, 150, 64, 64))


def scale_and_lengths() -> None:
    compare(*tensors(1, 1, 1, 70, 32, torch.float16), random_plan(1, 70, 64, 64), scale=0.9)
    compare(*tensors(1, 1, 70, 1, 32, torch.float16), random_plan(70, 1, 64, 64), scale=0.02)


def _refusal(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> str:
    try:
        attend(q, k, v, plan, backend="triton")
    except ValueError as error:
        return str(error)
    raise AssertionError("the call was accepted")


def bfloat16_is_refused() -> None:
    q, k, v = tensors(1, 1, 64, 64, 32, torch.bfloat16)
    plan = random_plan(64, 64, 64, 64)
    assert "interpreter multiplies bfloat16 wrongly" in _refusal(q, k, v, plan)
    assert not explain(q, k, v, plan)[0].ok


def unfit_calls_are_refused() -> None:
    q, k, v = tensors(1, 1, 64, 64, 32, torch.float32)
    assert "multiple of 16" in _refusal(q, k, v, random_plan(64, 64, 40, 64))
    turned = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert "last stride 1" in _refusal(turned, k, v, random_plan(64, 64, 64, 64))
    assert "above 256" in _refusal(*tensors(1, 1, 64, 64, 264, torch.float32), random_plan(64, 64, 64, 64))


def auto_does_not_interpret() -> None:
    support = choose_backend("cpu", torch.float32, 32, random_plan(64, 64, 64, 64))
    assert support.backend == "gather" and "TRITON_INTERPRET" in support.reason


CASES: tuple[Callable[[], None], ...] = (
    float32_odd_length,
    float16_blocks_wider_than_tiles,
    blocks_of_64,
    unusual_blocks,
    lists_per_batch_and_head,
    lists_per_batch,
    band,
    band_with_text_and_full_tail,
    band_without_text_on_whole_blocks,
    band_of_one_frame,
    order_of_tokens,
    padded_head_dims,
    fused_projection_views,
    scale_and_lengths,
    bfloat16_is_refused,
    unfit_calls_are_refused,
    auto_does_not_interpret,
)
