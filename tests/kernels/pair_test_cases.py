"""Plans with every pair test, and the check that holds a backend against float64 attention under their masks.

interpreter_runner.py runs the Triton kernels through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.bitmap import Bitmap
from dit_accel.kernels.pair_tests import Band, Neighborhood, PairTest
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

BATCH, HEADS, DIM = 3, 2, 16
OUT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}
# Cotangents of order one through 16-bit weights, outputs and score gradients.
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def random_plan(
    test: PairTest, q_len: int, kv_len: int, block_q: int, block_kv: int, *lead: int, **rest: Any
) -> SparsePlan:
    """Random blocks, cut by the test; the second row of blocks is empty."""
    torch.manual_seed(1)
    keep = torch.rand(*(lead or (1, 1)), -(-q_len // block_q), -(-kv_len // block_kv)) < 0.8
    keep[..., 1, :] = False
    plan = plan_from_blocks(
        keep, pair_test=test, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, **rest
    )
    assert (plan.full_counts < plan.counts).any(), "the plan has no partial block"
    return plan


def random_bitmap(lead: tuple[int, int], q_len: int, kv_len: int, block_q: int, block_kv: int) -> Bitmap:
    """Random pairs; the first query keeps nothing, some blocks are kept or dropped as a whole."""
    torch.manual_seed(2)
    mask = torch.rand(*lead, q_len, kv_len) < 0.4
    mask[..., : 2 * block_q, :block_kv] = True
    mask[..., -block_q // 2 :, block_kv : 2 * block_kv] = False
    mask[..., 0, :] = False
    return Bitmap.from_mask(mask, block_q=block_q, block_kv=block_kv)


def band() -> SparsePlan:
    test = Band(30, torch.tensor([30, 9, 4, -1, 0], dtype=torch.int32), 130, 8)
    return random_plan(test, 141, 141, 64, 32, 1, HEADS)


def neighborhood_of_a_line() -> SparsePlan:
    return random_plan(Neighborhood.of((60,), 11, stride=4, dilation=3), 71, 71, 32, 16, BATCH, 1)


def neighborhood_of_a_picture() -> SparsePlan:
    return random_plan(Neighborhood.of((11, 12), (4, 5), stride=(2, 1)), 141, 141, 64, 32, 1, HEADS)


def neighborhood_of_a_video() -> SparsePlan:
    test = Neighborhood.of((3, 5, 6), (2, 3, 3), stride=(2, 1, 3), dilation=(1, 1, 2), causal=(True, False, True))
    return random_plan(test, 90, 90, 32, 32)


def neighborhood_of_fewer_queries() -> SparsePlan:
    return random_plan(Neighborhood.of((3, 6, 7), (2, 3, 4)), 70, 131, 32, 64)


def neighborhood_of_a_permuted_plan() -> SparsePlan:
    order = torch.randperm(101, generator=torch.Generator().manual_seed(3))
    return random_plan(Neighborhood.of((3, 4, 8), (3, 3, 5)), 101, 101, 64, 32, 1, HEADS, order=order)


def neighborhood_of_permuted_tokens() -> SparsePlan:
    raster = torch.randperm(90, generator=torch.Generator().manual_seed(4))
    test = Neighborhood.of((3, 4, 7), (3, 3, 3), dilation=(1, 1, 2), raster=raster)
    return random_plan(test, 90, 90, 32, 32)


def bitmap_for_all() -> SparsePlan:
    return random_plan(random_bitmap((1, 1), 70, 101, 32, 48), 70, 101, 32, 48, 1, HEADS)


def bitmap_per_head() -> SparsePlan:
    return random_plan(random_bitmap((1, HEADS), 101, 70, 64, 16), 101, 70, 64, 16)


def bitmap_per_batch_and_head() -> SparsePlan:
    return random_plan(random_bitmap((BATCH, HEADS), 40, 50, 16, 32), 40, 50, 16, 32, BATCH, 1)


PLANS: tuple[Callable[[], SparsePlan], ...] = (
    band,
    neighborhood_of_a_line,
    neighborhood_of_a_picture,
    neighborhood_of_a_video,
    neighborhood_of_fewer_queries,
    neighborhood_of_a_permuted_plan,
    neighborhood_of_permuted_tokens,
    bitmap_for_all,
    bitmap_per_head,
    bitmap_per_batch_and_head,
)

# Under the interpreter, which is slow; the tests do not differ by dtype.
IN_FLOAT16 = (neighborhood_of_a_picture, bitmap_for_all)


def tensors(plan: SparsePlan, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random q, k, v and cotangents of out and lse; all but the last transposed views of [B, S, H, D] storage."""
    torch.manual_seed(0)
    batch, lengths = plan.indices.shape[0], (plan.q_len, plan.kv_len, plan.kv_len, plan.q_len)
    views = (torch.randn(batch, n, HEADS, DIM).to(dtype).transpose(1, 2) for n in lengths)
    return *views, torch.randn(batch, HEADS, plan.q_len)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in float64, without code of the package; lse 0 for queries without keys, as autograd needs it."""
    some = mask.any(-1, keepdim=True)
    scores = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~mask, float("-inf")).masked_fill(~some, 0.0)
    return (scores.softmax(-1) * mask) @ v, scores.logsumexp(-1) * some[..., 0]


def check(
    plan: SparsePlan, backend: str, dtype: torch.dtype, *, backward: bool = True, lse_tolerance: float = 1e-5
) -> None:
    """Holds out, lse and gradients of a backend against the oracle."""
    *inputs, grad_out, grad_lse = tensors(plan, dtype)
    leaves = [t.requires_grad_(backward) for t in inputs]
    truths = [t.detach().double().requires_grad_(backward) for t in inputs]
    mask = plan.element_mask().expand(-1, HEADS, -1, -1)
    out, lse = attend(leaves[0], leaves[1], leaves[2], plan, return_lse=True, backend=backend)
    expected, expected_lse = oracle(truths[0], truths[1], truths[2], mask)
    some = mask.any(-1)
    assert not some.all() and some.any()
    close(out, expected, OUT_TOLERANCE[dtype])
    close(lse[some], expected_lse[some], lse_tolerance)
    assert lse[~some].eq(float("-inf")).all() and out[~some].eq(0).all()
    if backward:
        found = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
        wanted = torch.autograd.grad((expected, expected_lse), truths, (grad_out.double(), grad_lse.double()))
        for grad, truth in zip(found, wanted, strict=True):
            close(grad, truth, GRADIENT_TOLERANCE[dtype])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares in float64."""
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def _case(make: Callable[[], SparsePlan], dtype: str) -> Callable[[], None]:
    def case() -> None:
        check(make(), "triton", DTYPES[dtype])

    case.__name__ = f"{make.__name__} {dtype}"
    return case


CASES = (
    *(_case(make, "float32") for make in PLANS),
    *(_case(make, "float16") for make in IN_FLOAT16),
)
