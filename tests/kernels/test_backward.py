"""Gradients of every backend that runs on the CPU, held against autograd through dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel.kernels.backward import BackwardInputs
from dit_accel.kernels.gather import backward as gather_backward
from dit_accel.kernels.gather.forward import gather_attention
from dit_accel.kernels.ops import block_sparse_attention
from dit_accel.kernels.pair_tests import Band, encode
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

from .backward_cases import (
    attention,
    check_empty_queries,
    check_gradients,
    cotangents,
    expected_gradients,
    gradients,
    leaves_of,
    random_plan,
    tensors,
)
from .costs import single_reads

BACKENDS = ("gather", "reference", "auto")
FRAME_TOKENS, ODD = 45, 7 * 45

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_band(text: int = 0) -> Band:
    widths = torch.tensor([FRAME_TOKENS, 30, 12, 5, 0, -1, 3], dtype=torch.int32)
    return Band(FRAME_TOKENS, widths, ODD - text, 20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_random_lists(backend: str, lead: tuple[int, int]) -> None:
    check_gradients(*tensors(3, 2, 333, 333, 24), random_plan(333, 333, 64, 64, *lead), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    check_gradients(*tensors(1, 2, 200, 200, 32, dtype), random_plan(200, 200, 64, 64), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_q", "block_kv"),
    [(300, 130, 64, 32), (130, 300, 32, 128), (1, 70, 64, 64), (70, 1, 16, 8)],
)
def test_lengths_and_blocks(backend: str, q_len: int, kv_len: int, block_q: int, block_kv: int) -> None:
    check_gradients(
        *tensors(1, 2, q_len, kv_len, 16), random_plan(q_len, kv_len, block_q, block_kv), backend, scale=0.7
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("text", [0, 21])
def test_band_with_sinks_and_text(backend: str, lead: tuple[int, int], text: int) -> None:
    keep = torch.rand(*lead, 5, 10) < 0.7
    partial = keep & (torch.rand(5, 10) < 0.6)
    sizes: dict[str, Any] = {"q_len": ODD, "kv_len": ODD, "block_q": 64, "block_kv": 32}
    plan = plan_from_blocks(keep, partial=partial, pair_test=make_band(text), **sizes)
    assert (plan.full_counts < plan.counts).any() and (plan.full_counts > 0).any()
    check_gradients(*tensors(2, 2, ODD, ODD, 16), plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys(backend: str) -> None:
    band = Band(100, torch.tensor([-1, 5, -1], dtype=torch.int32), 300)
    keep = torch.eye(3, dtype=torch.bool)
    keep[0, 1] = True
    sizes: dict[str, Any] = {"q_len": 300, "kv_len": 300, "block_q": 100, "block_kv": 100}
    check_empty_queries(
        *tensors(1, 2, 300, 300, 16), plan_from_blocks(keep, partial=keep, pair_test=band, **sizes), backend
    )
    check_empty_queries(*tensors(1, 2, 300, 300, 16), plan_from_blocks(keep & ~keep.diag().diag(), **sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("banded", [False, True])
def test_order_of_tokens(backend: str, banded: bool) -> None:
    plan = random_plan(ODD, ODD, 64, 64, 1, 2, order=torch.randperm(ODD), pair_test=make_band() if banded else None)
    check_gradients(*tensors(1, 2, ODD, ODD, 16), plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    plan = random_plan(150, 150, 64, 64, 1, 3)
    q, k, v = torch.randn(2, 150, 3, 3, 16).permute(2, 0, 3, 1, 4)  # one fused projection, split by views
    check_gradients(q, k, v, plan, backend)
    check_gradients(
        q.transpose(-1, -2).contiguous().transpose(-1, -2), k, v[:, :1].expand(-1, 3, -1, -1), plan, backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_without_strides(backend: str) -> None:
    q, k, v = tensors(1, 2, 100, 100, 16)
    plan = random_plan(100, 100, 32, 32)
    constant = torch.ones(()).expand(q.shape), torch.zeros(()).expand(q.shape[:3])
    found = gradients(q, k, v, plan, backend, *constant, 0.25)
    expected = expected_gradients(q, k, v, plan, *constant, 0.25)
    for grad, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_finite(backend: str) -> None:
    q, k, v = tensors(1, 1, 200, 200, 16)
    check_gradients(q * 8, k * 8, v, random_plan(200, 200, 64, 64), backend, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("output", [0, 1])
def test_only_what_is_asked_for(backend: str, asked: tuple[int, ...], output: int) -> None:
    inputs = tensors(1, 2, 100, 100, 16)
    plan = random_plan(100, 100, 32, 32)
    grad_out, grad_lse = cotangents(inputs[0])
    cotangent = (grad_out * (output == 0), grad_lse * (output == 1))
    expected = expected_gradients(*inputs, plan, *cotangent, 0.25)
    for i in asked:
        inputs[i].requires_grad_()
    attention(*inputs, plan, backend, 0.25)[output].backward(cotangent[output])
    for i, (leaf, truth) in enumerate(zip(inputs, expected, strict=True)):
        assert (leaf.grad is not None) == (i in asked)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bytes_", [1, 500_000])
def test_gather_in_small_stacks(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gather_backward._STACK_BYTES, "cpu", bytes_)
    check_gradients(*tensors(2, 2, 150, 150, 16), random_plan(150, 150, 32, 32, 2, 2), "gather")
    band = Band(30, torch.tensor([30, 9, 4, 0, -1], dtype=torch.int32), 150)
    check_gradients(*tensors(2, 2, 150, 150, 16), random_plan(150, 150, 32, 32, pair_test=band), "gather")


def test_rows_with_partial_blocks_are_read_together() -> None:
    """A GPU would be waited for at each number that is read by itself."""

    def reads_and_rows(tokens: int) -> tuple[int, int]:
        band = Band(50, torch.tensor([50, 5, 0, -1, -1, -1], dtype=torch.int32), tokens)
        plan = random_plan(tokens, tokens, 32, 32, pair_test=band)
        q, k, v = tensors(1, 2, tokens, tokens, 16)
        out, lse = gather_attention(q, k, v, plan, 0.25)
        inputs = BackwardInputs(q, k, v, out, lse, torch.ones_like(out), torch.zeros_like(lse))
        reads = single_reads(lambda: gather_backward.gather_backward(inputs, plan, 0.25))
        return reads, int((plan.full_counts < plan.counts).sum())

    (few_reads, few_rows), (many_reads, many_rows) = reads_and_rows(100), reads_and_rows(300)
    assert 0 < few_rows < many_rows and few_reads == many_reads


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend: str) -> None:
    q, k, v = tensors(2, 2, 333, 333, 16)
    plan, cotangent = random_plan(333, 333, 32, 32, 2, 2), cotangents(q)
    first, second = (gradients(q, k, v, plan, backend, *cotangent, 0.25) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_forward_is_the_same_and_keeps_nothing_without_gradients() -> None:
    q, k, v = tensors(1, 2, 100, 100, 16)
    plan = random_plan(100, 100, 32, 32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        plain = attention(q, k, v, plan, "gather", 0.25)
        assert not kept and not plain[0].requires_grad
        tracked = attention(q.detach().requires_grad_(), k, v, plan, "gather", 0.25)
        assert kept and tracked[0].requires_grad and tracked[1].requires_grad
        with torch.no_grad():
            kept.clear()
            attention(q.detach().requires_grad_(), k, v, plan, "gather", 0.25)
        assert not kept
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))


def test_gradients_are_not_differentiated_again() -> None:
    q, k, v = tensors(1, 1, 64, 64, 16)
    leaf = q.detach().requires_grad_()
    out, _ = attention(leaf, k, v, random_plan(64, 64, 32, 32), "gather", 0.25)
    (grad,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_operator_with_gradients_is_well_formed(banded: bool, backend: str) -> None:
    band = Band(30, torch.tensor([30, 9, 4, 0], dtype=torch.int32), 100, 8) if banded else None
    plan = random_plan(100, 100, 32, 32, 1, 2, pair_test=band)
    leaves = leaves_of(*tensors(2, 2, 100, 100, 16))
    test = encode(band)
    lists = (plan.indices, plan.counts, plan.full_counts, test.table, test.lookup, test.kind, test.numbers)
    outcome = torch.library.opcheck(block_sparse_attention, (*leaves, *lists, 32, 32, 0.25, backend))
    assert set(outcome.values()) == {"SUCCESS"}


def test_one_compiled_graph_with_gradients() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> Tensor:
        out, lse = attention(q * 2, k, v, plan, "auto", 0.25)
        return (out * lse.sigmoid()[..., None]).sin().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    leaves = leaves_of(*tensors(1, 2, 100, 100, 16))
    for density in (0.4, 0.6):
        keep = torch.rand(2, 4, 4) < density
        keep[:, 0] = True  # the same capacity for both
        plan = plan_from_blocks(keep[None], q_len=100, kv_len=100, block_q=32, block_kv=32)
        found = torch.autograd.grad(compiled(*leaves, plan), leaves)
        expected = torch.autograd.grad(layer(*leaves, plan), leaves)
        for grad, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, truth, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_flex_refuses_gradients_before_they_are_missed() -> None:
    with pytest.raises(NotImplementedError, match="flex attention backend has no backward pass"):
        attention(*leaves_of(*tensors(1, 1, 64, 64, 16)), random_plan(64, 64, 32, 32), "flex", 0.25)
