"""Cases that hold the search kernels against their torch paths; interpreter_runner.py runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.search.mass import block_mass
from dit_accel.kernels.search.plan import dynamic_plan
from dit_accel.kernels.search.pooled import block_means, pooled_scores, sub_block_scores


def tensors(batch: int, heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random q, k `[batch, tokens, heads, dim]`; k is a view of `[batch, heads, tokens, dim]` storage."""
    q = torch.randn(batch, q_len, heads, dim).to(dtype)
    k = torch.randn(batch, heads, kv_len, dim).to(dtype).transpose(1, 2)
    return q, k


def compare_mass(q: Tensor, k: Tensor, block_q: int, block_kv: int, **options: Any) -> None:
    """Holds the kernels against the torch path, with a computed and with a given log-sum-exp."""
    options |= {"block_q": block_q, "block_kv": block_kv}
    expected, expected_lse = block_mass(q, k, return_lse=True, backend="torch", **options)
    mass, lse = block_mass(q, k, return_lse=True, backend="triton", **options)
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    cached = block_mass(q, k, lse=expected_lse, backend="triton", **options)
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)


def mass_float32_odd_lengths() -> None:
    compare_mass(*tensors(3, 2, 70, 140, 64, torch.float32), 64, 128)


def mass_blocks_wider_than_tiles() -> None:
    compare_mass(*tensors(1, 1, 260, 256, 32, torch.float16), 256, 128)


def mass_whole_blocks() -> None:
    compare_mass(*tensors(1, 2, 128, 192, 64, torch.float16), 64, 64)


def mass_unusual_blocks() -> None:
    compare_mass(*tensors(1, 1, 100, 130, 16, torch.float16), 48, 80)


def mass_padded_head_dims() -> None:
    for dim in (8, 72, 160):
        compare_mass(*tensors(1, 1, 70, 70, dim, torch.float16), 64, 64)


def mass_scale_and_short_lengths() -> None:
    compare_mass(*tensors(1, 1, 1, 70, 32, torch.float32), 64, 64, scale=0.9)
    compare_mass(*tensors(1, 1, 70, 1, 32, torch.float32), 64, 64, scale=0.02)


def mass_large_scores() -> None:
    q, k = tensors(1, 1, 70, 90, 32, torch.float32)
    compare_mass(q, k, 32, 32, scale=5.0)


def mass_views_of_a_fused_projection() -> None:
    fused = torch.randn(2, 100, 3, 2, 32).half()
    compare_mass(fused[:, :, 0], fused[:, :, 1], 64, 64)


def mass_every_second_query() -> None:
    q, k = tensors(2, 1, 90, 100, 32, torch.float32)
    _, lse = block_mass(q, k, block_q=64, block_kv=64, return_lse=True, backend="torch")
    sizes: dict[str, Any] = {"block_q": 32, "block_kv": 64}
    mass = block_mass(q[:, ::2], k, lse=lse[..., ::2], backend="triton", **sizes)
    expected = block_mass(q[:, ::2].contiguous(), k, backend="torch", **sizes)
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-5)


def mass_of_queries_without_keys_is_zero() -> None:
    q, k = tensors(1, 1, 64, 64, 32, torch.float32)
    lse = torch.full((1, 1, 64), float("-inf"))
    assert not block_mass(q, k, lse=lse, block_q=32, block_kv=32, backend="triton").any()


def means_of_odd_lengths() -> None:
    for x in (*tensors(2, 2, 133, 77, 40, torch.float32), *tensors(1, 2, 70, 33, 64, torch.float16)):
        for block in (17, 64, 300):
            wanted = block_means(x, block, backend="torch")
            torch.testing.assert_close(block_means(x, block, backend="triton"), wanted, rtol=0, atol=1e-6)


def pooled_and_sub_block_scores() -> None:
    q, k = tensors(2, 2, 203, 150, 32, torch.float32)
    sizes = {"block_q": 64, "block_kv": 32}
    pooled = [pooled_scores(q, k, **sizes, backend=name) for name in ("triton", "torch")]
    torch.testing.assert_close(*pooled, rtol=1e-5, atol=1e-5)
    fine = [sub_block_scores(q, k, **sizes, stride=16, backend=name) for name in ("triton", "torch")]
    torch.testing.assert_close(*fine, rtol=1e-5, atol=1e-5)


def plans_agree() -> None:
    q, k = tensors(1, 2, 103, 150, 32, torch.float32)
    for score in ("mass", "pooled", "lse"):
        options: dict[str, Any] = {"block_q": 32, "block_kv": 16, "score": score, "keep": "topk", "amount": 4}
        plans = [dynamic_plan(q, k, backend=name, **options) for name in ("triton", "torch")]
        assert torch.equal(plans[0].to_bool(), plans[1].to_bool())
        assert plans[0].stats.details["backend"] == "triton"


def _refused(call: Callable[[], object], message: str) -> None:
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError("the call was accepted")


def unfit_calls_are_refused() -> None:
    q, k = tensors(1, 1, 64, 64, 32, torch.float32)
    _refused(lambda: block_mass(q, k, block_q=40, block_kv=64, backend="triton"), "multiple of 16")
    turned = tensors(1, 2, 64, 64, 32, torch.float32)[0].transpose(-1, -2).contiguous().transpose(-1, -2)
    _refused(lambda: block_means(turned, 16, backend="triton"), "last stride 1")
    _refused(lambda: block_means(q.bfloat16(), 16, backend="triton"), "bfloat16")


def auto_does_not_interpret() -> None:
    q, k = tensors(1, 1, 64, 64, 32, torch.float32)
    plan = dynamic_plan(q, k, block_q=32, block_kv=32, amount=1)
    assert plan.stats.details["backend"] == "torch"


CASES: tuple[Callable[[], None], ...] = (
    mass_float32_odd_lengths,
    mass_blocks_wider_than_tiles,
    mass_whole_blocks,
    mass_unusual_blocks,
    mass_padded_head_dims,
    mass_scale_and_short_lengths,
    mass_large_scores,
    mass_views_of_a_fused_projection,
    mass_every_second_query,
    mass_of_queries_without_keys_is_zero,
    means_of_odd_lengths,
    pooled_and_sub_block_scores,
    plans_agree,
    unfit_calls_are_refused,
    auto_does_not_interpret,
)
