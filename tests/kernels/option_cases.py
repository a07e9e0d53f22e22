"""Cases that hold each option of the pointer kernel against attention in float64; interpreter_runner.py runs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks
from dit_accel.kernels.triton_kernels.forward import triton_attention
from dit_accel.kernels.triton_kernels.options import KernelOptions, longest_first

LONGEST_FIRST = KernelOptions(longest_first=True)
LAZY, STATIC = KernelOptions(softmax="lazy"), KernelOptions(softmax="static")
# Scores in base 2 are then what q . k gives.
BASE_2 = 0.6931471805599453

Triple = tuple[Tensor, Tensor, Tensor]


def tensors(batch: int, heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype = torch.float32) -> Triple:
    """Random q, k, v as transposed views of [batch, tokens, heads, dim] storage."""
    q, k, v = (torch.randn(batch, n, heads, dim).to(dtype).transpose(1, 2) for n in (q_len, kv_len, kv_len))
    return q, k, v


def plan_of(keep: Tensor, q_len: int, kv_len: int, block: int = 64, band: Band | None = None) -> SparsePlan:
    return plan_from_blocks(keep, q_len=q_len, kv_len=kv_len, block_q=block, block_kv=block, pair_test=band)


def dense_plan(q_len: int, kv_len: int) -> SparsePlan:
    return plan_of(torch.ones(-(-q_len // 64), -(-kv_len // 64), dtype=torch.bool), q_len, kv_len)


def oracle(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in float64: out 0 and lse -inf for queries without keys."""
    mask = plan.element_mask()
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v.double(), scores.logsumexp(-1)


def compare(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, options: KernelOptions, scale: float = 0.25
) -> tuple[Tensor, Tensor]:
    out, lse = triton_attention(q, k, v, plan, scale, options=options)
    expected, expected_lse = oracle(q, k, v, plan, scale)
    tolerance = 1e-5 if q.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    return out, lse


def staircase(rows: int, columns: int) -> Tensor:
    """Row i lists i blocks, so that the first one lists none; the last column is always listed otherwise."""
    keep = torch.arange(columns) < torch.arange(rows)[:, None]
    keep[1:, -1] = True
    return keep


def band(video: int) -> Band:
    return Band(40, torch.tensor([40, 15, 6, -1, 0], dtype=torch.int32), video, 10)


def longest_first_with_skewed_counts() -> None:
    keep = torch.stack([staircase(5, 5), staircase(5, 5).flip(0)])[None]
    q, k, v = tensors(3, 2, 300, 300, 16)
    plan = plan_of(keep, 300, 300)
    order = longest_first(plan.counts)
    assert order.dtype == torch.int32 and plan.counts.gather(-1, order.long()).diff(dim=-1).le(0).all()
    assert order[0, 0].tolist() == [4, 3, 2, 1, 0] and longest_first(plan.counts) is order
    found = compare(q, k, v, plan, LONGEST_FIRST)
    # The rows do not know in which order they run.
    assert all(torch.equal(a, b) for a, b in zip(found, triton_attention(q, k, v, plan, 0.25), strict=True))


def longest_first_with_tiles_smaller_than_blocks() -> None:
    plan = plan_of(staircase(3, 3), 300, 300, block=128)
    compare(*tensors(1, 2, 300, 300, 16), plan, LONGEST_FIRST)


def longest_first_with_a_band() -> None:
    plan = plan_of(staircase(4, 4), 200, 200, band=band(200))
    compare(*tensors(2, 2, 200, 200, 16), plan, LONGEST_FIRST)


def lazy_on_random_plans() -> None:
    keep = torch.rand(2, 2, 3, 5) < 0.6
    keep[:, :, 1] = False
    compare(*tensors(2, 2, 170, 290, 32), plan_of(keep, 170, 290), LAZY)
    compare(*tensors(1, 1, 170, 290, 64, torch.float16), plan_of(keep[:1, :1], 170, 290), LAZY)


def lazy_with_a_band() -> None:
    compare(*tensors(2, 2, 200, 200, 16), plan_of(torch.rand(4, 4) < 0.8, 200, 200, band=band(170)), LAZY)


def ramp(*heights: float) -> Triple:
    """q, k, v whose base-2 scores follow `heights`, one for each 32 keys; every second query sees them mirrored."""
    q, k, v = tensors(1, 1, 70, 32 * len(heights), 16)
    q, k = torch.zeros_like(q), torch.randint(-8, 9, k.shape) / 8.0
    q[..., 0], q[..., 1] = 1.0 - 2.0 * (torch.arange(70) % 2), 1.0
    k[..., 0] = torch.tensor(heights).repeat_interleave(32)
    return q, k, v


def lazy_with_slow_growth() -> None:
    # Never 8 in one step, 150 in all: the forgone steps must add up.
    q, k, v = ramp(*(5.0 * step for step in range(30)))
    compare(q, k, v, dense_plan(70, k.shape[2]), LAZY, BASE_2)
    # Up to the threshold and not above.
    q, k, v = ramp(*(0.5 * step for step in range(12)))
    compare(q, k, v, dense_plan(70, k.shape[2]), LAZY, BASE_2)


def lazy_with_sudden_growth() -> None:
    q, k, v = ramp(0.0, 2.0, 140.0, 3.0, 139.0, 0.0, 7.0, 146.0, -200.0, 0.0)
    compare(q, k, v, dense_plan(70, k.shape[2]), LAZY, BASE_2)


def lazy_when_one_row_grows() -> None:
    q, k, v = tensors(1, 1, 64, 256, 16)
    q[:, :, 3] *= 60.0
    compare(q, k, v, dense_plan(64, 256), LAZY)


def static_on_random_plans() -> None:
    keep = torch.rand(2, 2, 3, 5) < 0.6
    keep[:, :, 1] = False
    compare(*tensors(2, 2, 170, 290, 32), plan_of(keep, 170, 290), STATIC)


def static_with_a_band() -> None:
    compare(*tensors(2, 2, 200, 200, 16), plan_of(torch.rand(4, 4) < 0.8, 200, 200, band=band(170)), STATIC)


def static_within_its_bound() -> None:
    # All scores near one end: the sums are near 2 ** -58 for every second query, and near 2 ** 58 for the others.
    q, k, v = ramp(*(57.0 for _ in range(4)))
    k[..., 1:] /= 64.0
    compare(q, k, v, dense_plan(70, k.shape[2]), STATIC, BASE_2)


def static_beyond_its_bound() -> None:
    # Without the fallback, the exponentials of such scores are infinite.
    q, k, v = ramp(0.0, 100.0, 150.0, 20.0)
    compare(q, k, v, dense_plan(70, k.shape[2]), STATIC, BASE_2)


def static_in_some_tiles_of_queries() -> None:
    # Short binary fractions, so that large scores lose nothing on the way.
    q, k, v = ((t * 8.0).round() / 8.0 for t in tensors(2, 2, 200, 200, 16))
    q[0, :, 64:128] *= 8.0
    q[1, 1, :64] *= 8.0
    compare(q, k, v, dense_plan(200, 200), STATIC, 0.5)


def options_together() -> None:
    for softmax in ("lazy", "static"):
        options = KernelOptions(longest_first=True, softmax=softmax)
        compare(*tensors(1, 2, 200, 200, 16), plan_of(staircase(4, 4), 200, 200), options)


def static_refuses_float16() -> None:
    q, k, v = tensors(1, 1, 64, 64, 16, torch.float16)
    try:
        triton_attention(q, k, v, dense_plan(64, 64), 0.25, options=STATIC)
    except ValueError as error:
        assert "overflows float16" in str(error), error
    else:
        raise AssertionError("the call was accepted")


CASES: tuple[Callable[[], None], ...] = (
    longest_first_with_skewed_counts,
    longest_first_with_tiles_smaller_than_blocks,
    longest_first_with_a_band,
    lazy_on_random_plans,
    lazy_with_a_band,
    lazy_with_slow_growth,
    lazy_with_sudden_growth,
    lazy_when_one_row_grows,
    static_on_random_plans,
    static_with_a_band,
    static_within_its_bound,
    static_beyond_its_bound,
    static_in_some_tiles_of_queries,
    options_together,
    static_refuses_float16,
)
