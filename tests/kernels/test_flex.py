"""FlexAttention under a plan gives what the reference gives, and is never taken unasked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel.kernels import support
from dit_accel.kernels.attend import attend, choose_backend, explain
from dit_accel.kernels.flex import attention as flex
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks
from dit_accel.kernels.support import Call, check

FRAMES, FRAME_TOKENS, TEXT = 5, 7 * 9, 11
TOKENS = FRAMES * FRAME_TOKENS + TEXT
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}

# FlexAttention warns that it was not compiled, which is what `explain` says of it here.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tensors(batch: int = 3, dtype: torch.dtype = torch.float32, q_len: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(batch, n, 2, 24, generator=generator).to(dtype).transpose(1, 2) for n in (q_len, TOKENS, TOKENS)
    )
    return q, k, v


def make_plan(
    kind: str,
    lead: tuple[int, int] = (1, 2),
    block_q: int = 64,
    block_kv: int = 64,
    q_len: int = TOKENS,
    seed: int = 0,
) -> SparsePlan:
    """A random plan with an empty row of blocks; kinds: "whole", "band", "sinks", "empty"."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(*lead, -(-q_len // block_q), -(-TOKENS // block_kv), generator=generator) < 0.6
    keep[..., 1:2, :] = False
    keep[..., :1, :] = kind != "empty"
    keep &= torch.tensor(kind != "empty")
    widths = torch.tensor([FRAME_TOKENS, 20 + seed, 4, -1, 0], dtype=torch.int32)
    sinks = {"band": 0, "sinks": 30}
    band = Band(FRAME_TOKENS, widths, TOKENS - TEXT, sinks[kind]) if kind in sinks else None
    return plan_from_blocks(keep, q_len=q_len, kv_len=TOKENS, block_q=block_q, block_kv=block_kv, pair_test=band)


def compare(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, **options: Any) -> None:
    out, lse = attend(q, k, v, plan, return_lse=True, backend="flex", **options)
    expected, expected_lse = attend(q, k, v, plan, return_lse=True, backend="reference", **options)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
    # Natural log: a factor of ln 2 would show at once.
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5 if q.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", ["whole", "band", "sinks", "empty"])
@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_plans(kind: str, lead: tuple[int, int]) -> None:
    compare(*tensors(), make_plan(kind, lead))


@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 32), (100, 37)])
@pytest.mark.parametrize("q_len", [TOKENS, 201, 1])
def test_blocks_and_lengths(block_q: int, block_kv: int, q_len: int) -> None:
    compare(*tensors(q_len=q_len), make_plan("whole", (1, 2), block_q, block_kv, q_len), scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    compare(*tensors(dtype=dtype), make_plan("sinks"))


def test_rows_without_keys() -> None:
    out, lse = attend(*tensors(), make_plan("sinks"), return_lse=True, backend="flex")
    assert out[:, :, 64:128].eq(0).all() and lse[:, :, 64:128].isneginf().all()
    assert lse[:, :, :64].isfinite().all()


def test_order_of_tokens() -> None:
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    compare(*tensors(), replace(make_plan("sinks"), order=order))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_are_refused_not_lost(which: int) -> None:
    inputs = tensors(1)
    inputs[which].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"no backward pass.*no_grad"):
        attend(*inputs, make_plan("sinks"), backend="flex")
    with torch.no_grad():
        compare(*inputs, make_plan("sinks"))


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Sends CPU tensors down the path of GPUs: compiled, though without a fused kernel at the end."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex._call_flex, fullgraph=True, dynamic=False, backend=counter)
    monkeypatch.setattr(flex, "_COMPILED", ("cpu",))
    monkeypatch.setattr(flex, "_compiled_flex", lambda: compiled)
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["whole", "sinks"])
def test_compiled_once_for_plans_of_the_same_shapes(kind: str, counter: CompileCounterWithBackend) -> None:
    for seed in range(4):
        compare(*tensors(), make_plan(kind, seed=seed))
    assert counter.frame_count == 1
    compare(*tensors(2), make_plan(kind))
    assert counter.frame_count == 2


def test_too_many_shapes_are_not_run_by_the_stand_in(
    counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_COMPILATIONS", 2)
    for batch in (1, 2):
        compare(*tensors(batch), make_plan("whole"))
    with pytest.raises(RuntimeError, match=r"compiled for 2 different shapes already.*torch\.compiler\.reset"):
        attend(*tensors(3), make_plan("whole"), backend="flex")
    assert counter.frame_count == 2
    compare(*tensors(1), make_plan("whole"))


def test_inside_a_compiled_model() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> Tensor:
        return attend(q * 2, k, v, plan, backend="flex") + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        plan = make_plan("sinks", seed=seed)
        torch.testing.assert_close(compiled(*tensors(), plan), layer(*tensors(), plan), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("block", "tile"), [(16, 16), (48, 16), (64, 64), (192, 64), (128, None), (256, None)])
def test_tiles_divide_blocks(block: int, tile: int | None) -> None:
    options = flex._kernel_options(make_plan("whole", block_q=block, block_kv=64))
    assert options.get("BLOCK_M") == tile and options["BLOCK_N"] == 64


def test_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {answer.backend: answer for answer in explain(*tensors(), make_plan("whole"))}
    assert answers["flex"].ok and "all scores in memory" in answers["flex"].reason
    for device in ("cpu", "cuda", "mps"):
        for installed in (True, False):
            monkeypatch.setattr(support, "_triton_installed", lambda answer=installed: answer)
            assert choose_backend(device, torch.float16, 64, make_plan("whole")).backend != "flex"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("mps", torch.float16, 64, 64, 64), "not set up for tensors on 'mps'"),
        (Call("cuda", torch.float16, 8, 64, 64), "head dim 8 is not within 16 to 256"),
        (Call("cuda", torch.float16, 64, 40, 64), "block_q=40 is not a multiple of 16"),
        (Call("cuda", torch.float16, 64, 64, 100), "block_kv=100 is not a multiple of 16"),
    ],
)
def test_refusals_say_why(call: Call, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_triton_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    good = check("flex", Call("cuda", torch.float16, 64, 64, 64))
    assert good.ok and "compiled once per shape" in good.reason
    answer = check("flex", call)
    assert not answer.ok and reason in answer.reason


def test_refusals_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("cuda", torch.float16, 64, 64, 64)
    monkeypatch.setattr(support, "_triton_installed", lambda: False)
    assert "pip install triton" in check("flex", call).reason
    monkeypatch.setattr(support, "_triton_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not check("flex", call).ok and "unset it" in check("flex", call).reason
    monkeypatch.setattr(support, "_flex_problem", lambda: "torch 2.6 has an older FlexAttention")
    with pytest.raises(ValueError, match="older FlexAttention, or use backend='gather'"):
        attend(*tensors(), make_plan("whole"), backend="flex")
