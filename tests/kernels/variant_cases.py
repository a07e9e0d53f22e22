"""Cases that hold the Hopper kernel against attention in float64; interpreter_runner.py runs them.

The interpreter ignores warp specialization and treats descriptors as masked pointers, so this checks the arithmetic,
the walk over the lists and the tail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks
from dit_accel.kernels.support import Call, check, choose
from dit_accel.kernels.triton_kernels import self_check, variants

Triple = tuple[Tensor, Tensor, Tensor]


def tensors(batch: int, heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype) -> Triple:
    """Random q, k, v as transposed views of [batch, tokens, heads, dim] storage."""
    q, k, v = (torch.randn(batch, n, heads, dim).to(dtype).transpose(1, 2) for n in (q_len, kv_len, kv_len))
    return q, k, v


def random_plan(q_len: int, kv_len: int, block_q: int, block_kv: int, *lead: int, **rest: Any) -> SparsePlan:
    """A random plan; its first row ends with the last key block, and its second, where there is one, is empty."""
    keep = torch.rand(*(lead or (1, 1)), -(-q_len // block_q), -(-kv_len // block_kv)) < 0.6
    keep[..., 0, -1] = True
    keep[..., 1:2, :] = False
    return plan_from_blocks(keep, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, **rest)


def oracle(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention under the plan's mask in float64."""
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~plan.element_mask(), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return weights @ v.double(), lse


def compare(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float | None = None) -> None:
    """Holds the tma variant against the oracle, with and without the checks of `attend`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    assert check("triton:tma", Call.of(q, k, v, plan.block_q, plan.block_kv)).ok
    expected, expected_lse = oracle(q, k, v, plan, scale)
    tolerance = 1e-5 if q.dtype == torch.float32 else 1e-3
    out, lse = variants.attend_with("tma", q, k, v, plan, scale)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    again, again_lse = attend(q, k, v, plan, scale=scale, return_lse=True, backend="triton:tma")
    assert torch.equal(again, out) and torch.equal(again_lse, lse)


def batch_of_three_with_odd_lengths() -> None:
    compare(*tensors(3, 2, 333, 411, 64, torch.float32), random_plan(333, 411, 128, 128, 3, 2))
    compare(*tensors(3, 2, 257, 193, 64, torch.float16), random_plan(257, 193, 128, 64, 3, 1))


def whole_blocks() -> None:
    compare(*tensors(1, 2, 384, 256, 128, torch.float32), random_plan(384, 256, 128, 128, 1, 2))
    compare(*tensors(2, 1, 256, 256, 128, torch.float16), random_plan(256, 256, 128, 64))


def blocks_wider_than_tiles() -> None:
    # The last block holds 5 keys, so three of its four tiles lie behind the end.
    compare(*tensors(1, 2, 300, 773, 32, torch.float32), random_plan(300, 773, 256, 256, 1, 2))
    compare(*tensors(1, 1, 300, 400, 64, torch.float16), random_plan(300, 400, 128, 192))


def padded_head_dims() -> None:
    for dim in (8, 40, 72, 96):
        compare(*tensors(1, 2, 130, 150, dim, torch.float16), random_plan(130, 150, 128, 128))


def fused_projection_views() -> None:
    q, k, v = torch.randn(2, 150, 3, 2, 32).half().permute(2, 0, 3, 1, 4)
    compare(q, k, v, random_plan(150, 150, 128, 64))


def scale_and_lengths() -> None:
    compare(*tensors(1, 1, 1, 70, 32, torch.float32), random_plan(1, 70, 128, 64), scale=0.9)
    compare(*tensors(1, 1, 70, 1, 32, torch.float32), random_plan(70, 1, 128, 128), scale=0.02)


def no_keys_at_all() -> None:
    keep = torch.zeros(2, 3, dtype=torch.bool)
    q, k, v = tensors(1, 2, 200, 300, 32, torch.float32)
    plan = plan_from_blocks(keep, q_len=200, kv_len=300, block_q=128, block_kv=128)
    out, lse = attend(q, k, v, plan, return_lse=True, backend="triton:tma")
    assert (out == 0).all() and (lse == float("-inf")).all()


def equal_inputs_give_equal_outputs() -> None:
    q, k, v = tensors(1, 1, 256, 256, 64, torch.float16)
    plan = random_plan(256, 256, 128, 64)
    assert torch.equal(attend(q, k, v, plan, backend="triton:tma"), attend(q, k, v, plan, backend="triton:tma"))


def gradients_come_from_the_pointer_kernels() -> None:
    plan = random_plan(256, 130, 128, 128)
    q, k, v = tensors(1, 1, 256, 130, 32, torch.float32)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = attend(leaves[0], leaves[1], leaves[2], plan, backend=backend)
        return torch.autograd.grad(out.square().sum(), leaves)

    for mine, theirs in zip(gradients("triton:tma"), gradients("reference"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _refusal(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, backend: str = "triton:tma") -> str:
    try:
        attend(q, k, v, plan, backend=backend)
    except ValueError as error:
        assert backend in str(error)
        return str(error)
    raise AssertionError("the call was accepted")


def unfit_calls_are_refused() -> None:
    q, k, v = tensors(1, 1, 256, 256, 32, torch.float16)
    banded = random_plan(256, 256, 128, 128, pair_test=Band(64, torch.tensor([9, 3, 1, 0], dtype=torch.int32), 256))
    assert "pair test" in _refusal(q, k, v, banded)
    assert "block_q=64" in _refusal(q, k, v, random_plan(256, 256, 64, 64))
    assert "block_kv=96" in _refusal(q, k, v, random_plan(256, 256, 128, 96))
    plan = random_plan(256, 256, 128, 128)
    assert "above 128" in _refusal(*tensors(1, 1, 256, 256, 136, torch.float16), plan)
    storage = torch.randn(256 * 36 + 8).half()
    assert "16 bytes" in _refusal(q, storage[:9216].view(1, 1, 256, 36)[..., :32], v, plan)
    assert "16 bytes" in _refusal(q, k, storage[1 : 1 + 256 * 32].view(1, 1, 256, 32), plan)
    assert "overlapping" in _refusal(q, k[:, :, :1].expand(-1, -1, 256, -1), v, plan)
    assert "cannot be interpreted" in _refusal(q, k, v, plan, "triton:gluon")


def triton_without_a_variant_interprets_the_pointer_kernel() -> None:
    q, k, v = tensors(1, 1, 128, 128, 32, torch.float16)
    plan = random_plan(128, 128, 128, 128)
    call = Call.of(q, k, v, 128, 128)
    assert check("triton", call).variant == "pointer" and choose(call).backend == "gather"
    torch.testing.assert_close(
        attend(q, k, v, plan, backend="triton:pointer"), attend(q, k, v, plan, backend="triton"), rtol=0, atol=0
    )


def self_check_accepts_the_kernel() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for variant in ("tma", "pointer"):
            outcome = self_check.examine(variant, torch.device("cpu"))
            assert outcome.ok and outcome.error is not None and 0 < outcome.error < 4e-3, outcome
    finally:
        torch.set_default_dtype(torch.float32)


def self_check_finds_mistakes() -> None:
    right = variants.attend_with

    def with_mistake(mistake: Callable[[Tensor, Tensor], object]) -> self_check.Outcome:
        def wrong(*call: Any) -> tuple[Tensor, Tensor]:
            out, lse = right(*call)
            mistake(out, lse)
            return out, lse

        variants.attend_with = wrong  # type: ignore[assignment]
        case = self_check.Case(torch.float16, 64, 64, 300, 333, 4e-3)
        try:
            return self_check.examine("tma", torch.device("cpu"), (case,))
        finally:
            variants.attend_with = right

    mistakes: tuple[Callable[[Tensor, Tensor], object], ...] = (
        lambda out, lse: out[1, 2, 299].add_(0.1),
        lambda out, lse: out[0, 0, 130].fill_(float("nan")),
        lambda out, lse: lse[0, 0, 0].add_(0.1),
        lambda out, lse: lse[1, 1, 200].fill_(0.0),
        lambda out, lse: lse[1, 1, 200].fill_(float("nan")),
        lambda out, lse: lse[0, 1, 0].fill_(float("-inf")),
    )
    assert with_mistake(lambda out, lse: None).ok
    for number, mistake in enumerate(mistakes):
        outcome = with_mistake(mistake)
        assert not outcome.ok and "wrong" in outcome.reason, (number, outcome)


CASES: tuple[Callable[[], None], ...] = (
    batch_of_three_with_odd_lengths,
    whole_blocks,
    blocks_wider_than_tiles,
    padded_head_dims,
    fused_projection_views,
    scale_and_lengths,
    no_keys_at_all,
    equal_inputs_give_equal_outputs,
    gradients_come_from_the_pointer_kernels,
    unfit_calls_are_refused,
    triton_without_a_variant_interprets_the_pointer_kernel,
    self_check_accepts_the_kernel,
    self_check_finds_mistakes,
)
