"""The centroid residual: means of unlisted blocks in the same softmax, on every backend that runs on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel.kernels import residual_attention as dense
from dit_accel.kernels.attend import attend, explain
from dit_accel.kernels.ops import block_sparse_attention
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.residual import Residual, block_residual
from dit_accel.kernels.search.plan import dynamic_plan
from dit_accel.kernels.sparse_plan import plan_from_blocks

from .residual_cases import check, check_gradients, leaves_of, oracle, random_plan, residual_attention, tensors

BACKENDS = ("gather", "reference", "flex")
DIFFERENTIABLE = ("gather", "reference", "auto")

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(1, 2), (3, 1)])
def test_random_lists(backend: str, dtype: torch.dtype, lead: tuple[int, int]) -> None:
    check(*tensors(3, 2, 150, 150, 16, dtype), random_plan(150, 150, 32, 32, *lead), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_q", "block_kv"),
    [(203, 203, 64, 64), (97, 300, 16, 32), (300, 97, 64, 16), (1, 70, 64, 16), (70, 1, 16, 16), (100, 90, 20, 37)],
)
def test_lengths_and_blocks(backend: str, q_len: int, kv_len: int, block_q: int, block_kv: int) -> None:
    plan = random_plan(q_len, kv_len, block_q, block_kv, 1, 2)
    check(*tensors(2, 2, q_len, kv_len, 24), plan, backend, scale=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("banded", [False, True])
def test_order_of_tokens_and_partial_blocks(backend: str, ordered: bool, banded: bool) -> None:
    test = Band(30, torch.tensor([30, 9, 4, 0, -1], dtype=torch.int32), 140, 10) if banded else None
    order = torch.randperm(150) if ordered else None
    plan = random_plan(150, 150, 32, 32, 1, 2, order=order, pair_test=test)
    assert (plan.full_counts < plan.counts).any() == banded
    check(*tensors(1, 2, 150, 150, 16), plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_list_nothing_see_the_means_only(backend: str) -> None:
    q, k, v = tensors(1, 2, 100, 96, 16)
    plan = plan_from_blocks(torch.zeros(4, 6) > 0, q_len=100, kv_len=96, block_q=32, block_kv=16)
    out, lse = residual_attention(q, k, v, plan, backend)
    k_mean, v_mean = (x.unflatten(2, (6, 16)).mean(3) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, k_mean, v_mean, scale=0.25)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    scores = q @ k_mean.transpose(-1, -2) * 0.25
    torch.testing.assert_close(lse, scores.repeat_interleave(16, -1).logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_full_plan_leaves_no_residual(backend: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(2, 2, 150, 150, 16, dtype)
    plan = plan_from_blocks(torch.ones(5, 5) > 0, q_len=150, kv_len=150, block_q=32, block_kv=32)
    found = residual_attention(q, k, v, plan, backend)
    expected = attend(q, k, v, plan, scale=0.25, return_lse=True, backend=backend)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) or (backend == "reference" and torch.allclose(a, b, rtol=1e-6, atol=1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_blocks_lose_nothing(backend: str) -> None:
    # Where a block's keys are all alike, its mean is each of them: the residual is exact, whatever is listed.
    q, k, v = tensors(1, 2, 100, 100, 16)
    k = k[:, :, torch.arange(100) // 16 * 16]
    plan = random_plan(100, 100, 32, 16, 1, 2)
    dense_out = F.scaled_dot_product_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(residual_attention(q, k, v, plan, backend)[0], dense_out, rtol=1e-5, atol=1e-5)


def test_large_scores_stay_finite() -> None:
    q, k, v = tensors(1, 1, 100, 100, 16)
    plan = random_plan(100, 100, 32, 16)
    out, lse = residual_attention(q * 20, k * 20, v, plan, "gather")
    expected, expected_lse = oracle(q * 20, k * 20, v, plan, 0.25)
    assert expected_lse.max() > 300
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)


def test_few_scores_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dense._SCORE_BYTES, "cpu", 1)
    check(*tensors(2, 2, 150, 150, 16), random_plan(150, 150, 32, 32, 2, 2), "gather")
    check_gradients(*tensors(1, 2, 150, 150, 16), random_plan(150, 150, 32, 32, 1, 2), "gather")


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("lead", [(1, 1), (3, 2)])
def test_gradients(backend: str, lead: tuple[int, int]) -> None:
    check_gradients(*tensors(3, 2, 150, 150, 16), random_plan(150, 150, 32, 32, *lead), backend)
    check_gradients(*tensors(1, 2, 70, 130, 16), random_plan(70, 130, 16, 32), backend, scale=0.6)


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_gradients_with_order_and_partial_blocks(backend: str) -> None:
    test = Band(30, torch.tensor([30, 9, 4, 0, -1], dtype=torch.int32), 140, 10)
    plan = random_plan(150, 150, 32, 32, 1, 2, order=torch.randperm(150), pair_test=test)
    check_gradients(*tensors(1, 2, 150, 150, 16), plan, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(dtype: torch.dtype) -> None:
    check_gradients(*tensors(1, 2, 100, 100, 16, dtype), random_plan(100, 100, 32, 16), "gather")


@pytest.mark.parametrize("asked", [(0,), (3,), (4,), (1, 4)])
def test_only_what_is_asked_for(asked: tuple[int, ...]) -> None:
    q, k, v = tensors(1, 2, 100, 100, 16)
    plan = random_plan(100, 100, 32, 16)
    whole = block_residual(k, v, 16)
    leaves = [q, k, v, whole.k_mean, whole.v_sum]
    cotangent = torch.randn_like(q)

    def run(asked: tuple[int, ...]) -> list[Tensor | None]:
        given = [x.detach().clone().requires_grad_(i in asked) for i, x in enumerate(leaves)]
        residual = Residual(given[3], given[4], whole.sizes)
        out = attend(given[0], given[1], given[2], plan, residual=residual, backend="gather")
        out.backward(cotangent)
        return [x.grad for x in given]

    everything = run((0, 1, 2, 3, 4))
    for i, (found, truth) in enumerate(zip(run(asked), everything, strict=True)):
        assert (found is not None) == (i in asked)
        assert found is None or (truth is not None and torch.equal(found, truth) and bool(found.ne(0).any()))


def test_flex_refuses_gradients_of_means() -> None:
    q, k, v = tensors(1, 1, 64, 64, 16)
    residual = block_residual(k.requires_grad_(), v, 32)
    with pytest.raises(NotImplementedError, match="flex attention backend has no backward pass"):
        attend(q, k.detach(), v, random_plan(64, 64, 32, 32), residual=residual, backend="flex")


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_operator_is_well_formed(backend: str) -> None:
    plan = random_plan(100, 100, 32, 32, 1, 2)
    q, k, v = (x.requires_grad_() for x in tensors(2, 2, 100, 100, 16))
    residual = block_residual(k.detach(), v.detach(), 32)
    means = residual.k_mean.requires_grad_(), residual.v_sum.requires_grad_(), residual.sizes
    lists = plan.indices, plan.counts, plan.full_counts
    arguments: Any = (q, k, v, *lists, None, None, 0, [], 32, 32, 0.25, backend, *means)
    assert set(torch.library.opcheck(block_sparse_attention, arguments).values()) == {"SUCCESS"}


def test_one_compiled_graph_serves_two_plans() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, plan: Any) -> Tensor:
        out, lse = residual_attention(q * 2, k, v, plan, "auto")
        return (out * lse.sigmoid()[..., None]).sin().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    leaves = leaves_of(*tensors(1, 2, 100, 100, 16))
    for _ in range(2):
        plan = random_plan(100, 100, 16, 16, 1, 2)
        found, expected = (torch.autograd.grad(f(*leaves, plan), leaves) for f in (compiled, layer))
        for grad, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, truth, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("rule", ["topk", "gaussian"])
def test_what_it_is_for(rule: str) -> None:
    """On keys and values that vary smoothly, the residual takes most of the error of a sparse plan away."""
    time = torch.linspace(0, 6, 1024)[:, None] * torch.randint(1, 4, (3, 2, 1, 32)) + torch.rand(3, 2, 1, 32) * 6
    q, k, v = time.sin() + 0.2 * torch.randn(3, 1, 2, 1024, 32)
    options: Any = {"keep": "topk", "amount": 0.25} if rule == "topk" else {"keep": "gaussian", "amount": 1.0}
    plan = dynamic_plan(q.transpose(1, 2), k.transpose(1, 2), block_q=32, block_kv=32, **options)
    exact = F.scaled_dot_product_attention(q, k, v)
    without = attend(q, k, v, plan)
    with_means = attend(q, k, v, plan, residual=block_residual(k, v, 32))
    error, lost = ((x - exact).norm() / exact.norm() for x in (with_means, without))
    assert lost > 0.02 and error < lost / 4


def test_values_of_the_residual() -> None:
    _, k, v = tensors(2, 3, 8, 70, 16, torch.float16)
    order = torch.randperm(70)
    for tokens, given in ((torch.arange(70), None), (order, order)):
        found = block_residual(k, v, 32, order=given)
        for j, block in enumerate(tokens.split(32)):
            expected = k[:, :, block].double().mean(2), v[:, :, block].double().sum(2)
            torch.testing.assert_close(found.k_mean[:, :, j].double(), expected[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found.v_sum[:, :, j].double(), expected[1], rtol=1e-6, atol=1e-5)
        assert found.sizes.tolist() == [32, 32, 6] and found.k_mean.dtype == torch.float32


def test_residual_is_built_without_looking_at_values() -> None:
    k = torch.zeros(1, 2, 70, 16, device="meta")
    assert block_residual(k, k, 32, order=torch.zeros(70, dtype=torch.int64, device="meta")).sizes.shape == (3,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 70, 16)}, "must both be"),
        ({"v": torch.zeros(1, 2, 69, 16)}, "must both be"),
        ({"k": torch.zeros(1, 2, 70, 16).double()}, "accepted are"),
        ({"v": torch.zeros(1, 2, 70, 16).half()}, "the same for both"),
        ({"block_kv": 0}, "at least 1"),
        ({"order": torch.arange(69)}, "order must be int64"),
        ({"order": torch.arange(70, device="meta")}, "order is on meta"),
        ({"backend": "gather"}, "Unknown search backend"),
    ],
)
def test_refusals_of_the_builder(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"k": torch.zeros(1, 2, 70, 16), "v": torch.zeros(1, 2, 70, 16), "block_kv": 32}
    with pytest.raises(ValueError, match=message):
        block_residual(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_mean": torch.zeros(1, 2, 3, 16).half()}, "k_mean must be float32"),
        ({"sizes": torch.ones(3, dtype=torch.int32)}, "sizes must be float32"),
        ({"v_sum": torch.zeros(1, 2, 3, 8)}, "must both be"),
        ({"sizes": torch.ones(4)}, "key blocks"),
        ({"sizes": torch.ones(3, device="meta")}, "sizes is on meta"),
    ],
)
def test_refusals_of_the_residual(change: dict[str, Any], message: str) -> None:
    good = {"k_mean": torch.zeros(1, 2, 3, 16), "v_sum": torch.zeros(1, 2, 3, 16), "sizes": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        Residual(**(good | change))


def test_explain_takes_the_residual() -> None:
    q, k, v = tensors(1, 2, 256, 256, 64)
    plan = random_plan(256, 256, 128, 128)
    answers = {x.backend: x for x in explain(q, k, v, plan, residual=block_residual(k, v, 128))}
    assert answers["gather"].ok and set(answers) == {x.backend for x in explain(q, k, v, plan)}
    with pytest.raises(ValueError, match="in blocks of 128 need"):
        explain(q, k, v, plan, residual=block_residual(k, v, 64))


def test_attend_refuses_a_residual_of_other_keys() -> None:
    q, k, v = tensors(1, 2, 70, 70, 16)
    plan = random_plan(70, 70, 32, 32)
    with pytest.raises(ValueError, match="in blocks of 32 need"):
        attend(q, k, v, plan, residual=block_residual(k, v, 16))
    with pytest.raises(ValueError, match="Build it from the k and v"):
        attend(q, k, v, plan, residual=block_residual(k.to("meta"), v.to("meta"), 32))
    order = torch.arange(70)
    with pytest.raises(ValueError, match="residual has a token order, the plan has none"):
        attend(q, k, v, plan, residual=block_residual(k, v, 32, order=order))
    with pytest.raises(ValueError, match="plan has a token order, the residual has none"):
        attend(q, k, v, random_plan(70, 70, 32, 32, order=order), residual=block_residual(k, v, 32))
