"""xformers on gathered blocks gives what the reference gives.

xformers runs on GPUs only.  Here a stand-in with its call, its demands and its liberties computes in plain torch; the
last test holds the stand-in against the real source, wherever that is to be found.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels import support
from dit_accel.kernels.attend import attend, choose_backend, explain
from dit_accel.kernels.bitmap import Bitmap
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.residual import block_residual
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks
from dit_accel.kernels.support import Call, check
from dit_accel.kernels.xformers import attention as xformers_backend
from dit_accel.kernels.xformers.probe import xformers_problem

from .conftest import UnderDefault
from .costs import single_reads

FRAMES, FRAME_TOKENS, TEXT = 5, 7 * 9, 11
TOKENS = FRAMES * FRAME_TOKENS + TEXT
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
_LSE_ALIGNMENT = 32

Attention = Callable[..., tuple[Tensor, Tensor]]


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> tuple[Tensor, Tensor]:
    """Plain torch, [batch, tokens, heads, dim]; NaN wherever CUTLASS may leave what it likes."""
    assert p == 0.0 and op is None and output_dtype is None
    assert all(t.ndim == 4 and t.stride(-1) == 1 for t in (query, key, value))
    assert query.shape[0] == key.shape[0] == value.shape[0] <= 65535
    scores = torch.einsum("bmhk,bnhk->bhmn", query.float(), key.float())
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_bias is not None:
        assert attn_bias.dtype == query.dtype and attn_bias.shape == scores.shape
        assert all(stride * attn_bias.element_size() % 16 == 0 for stride in attn_bias.stride()[:-1])
        assert attn_bias.stride(-1) == 1
        scores = scores + attn_bias.float()
    out = torch.einsum("bhmn,bnhk->bmhk", scores.softmax(-1), value.float()).to(query.dtype)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse.isneginf(), math.nan)
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=math.inf)


def cpu_only(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """The answer of xformers 0.0.35 to CPU tensors, shortened."""
    raise NotImplementedError(
        "No operator found for `memory_efficient_attention_forward` with inputs:\n"
        f"     query       : shape={tuple(query.shape)} ({query.dtype})\n"
        "     p           : 0.0\n"
        "`fa2F@2.5.7-pt` is not supported because:\n"
        "    device=cpu (supported: {'cuda'})\n"
        "`cutlassF-pt` is not supported because:\n"
        "    device=cpu (supported: {'cuda'})\n"
        "    operator wasn't built - see `python -m xformers.info` for more info"
    )


def no_bias(*args: Any, attn_bias: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """A GPU whose only operators take no bias, such as flash attention."""
    if attn_bias is not None:
        raise NotImplementedError("No operator found\n`fa2F` is not supported because:\n    attn_bias type is Tensor")
    return memory_efficient_attention_forward_requires_grad(*args, **options)


def broken(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("CUDA error: no kernel image is available\nmore")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Attention], None]]:
    """Puts a package `xformers` with the given attention in place of the real one."""

    def put(function: Attention) -> None:
        package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
        package.__spec__, ops.__spec__ = ModuleSpec("xformers", None), ModuleSpec("xformers.ops", None)
        ops.memory_efficient_attention_forward_requires_grad = function  # type: ignore[attr-defined]
        package.ops = ops  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        xformers_problem.cache_clear()

    yield put
    xformers_problem.cache_clear()


@pytest.fixture
def stand_in(install: Callable[[Attention], None], poisoned: None) -> None:
    install(memory_efficient_attention_forward_requires_grad)


def tensors(batch: int = 3, dtype: torch.dtype = torch.float32, q_len: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(batch, n, 2, 24, generator=generator).to(dtype).transpose(1, 2) for n in (q_len, TOKENS, TOKENS)
    )
    return q, k, v


def make_plan(
    kind: str, lead: tuple[int, int] = (1, 2), block_q: int = 64, block_kv: int = 64, q_len: int = TOKENS
) -> SparsePlan:
    rows, cols = -(-q_len // block_q), -(-TOKENS // block_kv)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(*lead, rows, cols, generator=generator) < 0.6
    keep[..., 1:2, :] = False
    keep[..., :1, :] = kind != "empty"
    keep &= torch.tensor(kind != "empty")
    widths = torch.tensor([FRAME_TOKENS, 20, 4, -1, 0], dtype=torch.int32)
    sinks = {"band": 0, "sinks": 30}
    band = Band(FRAME_TOKENS, widths, TOKENS - TEXT, sinks[kind]) if kind in sinks else None
    return plan_from_blocks(keep, q_len=q_len, kv_len=TOKENS, block_q=block_q, block_kv=block_kv, pair_test=band)


def compare(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, **options: Any) -> None:
    out, lse = attend(q, k, v, plan, return_lse=True, backend="xformers", **options)
    expected, expected_lse = attend(q, k, v, plan, return_lse=True, backend="reference", **options)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5 if q.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", ["whole", "band", "sinks", "empty"])
@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_plans(kind: str, lead: tuple[int, int], stand_in: None) -> None:
    compare(*tensors(), make_plan(kind, lead))


@pytest.mark.parametrize("kind", ["whole", "sinks"])
@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 32), (100, 37)])
@pytest.mark.parametrize("q_len", [TOKENS, 201, 1])
def test_blocks_and_lengths(kind: str, block_q: int, block_kv: int, q_len: int, stand_in: None) -> None:
    compare(*tensors(q_len=q_len), make_plan(kind, (1, 2), block_q, block_kv, q_len), scale=0.3)


@pytest.mark.parametrize("lead", [(1, 1), (3, 2)])
def test_any_pairs(lead: tuple[int, int], stand_in: None) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(*lead, TOKENS, TOKENS, generator=generator) < 0.5
    mask[..., 64:128, :] = True
    mask[..., 200:, :128] = False
    mask[..., 17, :] = False
    side = -(-TOKENS // 64)
    plan = plan_from_blocks(
        torch.ones(side, side, dtype=torch.bool),
        q_len=TOKENS,
        kv_len=TOKENS,
        block_q=64,
        block_kv=64,
        pair_test=Bitmap.from_mask(mask, block_q=64, block_kv=64),
    )
    compare(*tensors(), plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, stand_in: None) -> None:
    compare(*tensors(dtype=dtype), make_plan("sinks"))


def test_chunks_and_order(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_backend, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(xformers_backend, "_CHUNK_BYTES", 2 * 3 * 64 * 24 * 4 * 2)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    compare(*tensors(), replace(make_plan("sinks"), order=order))


def test_residual(stand_in: None) -> None:
    q, k, v = tensors()
    compare(q, k, v, make_plan("sinks"), residual=block_residual(k, v, 64))


def test_gradients(stand_in: None) -> None:
    plan, grads = make_plan("sinks"), {}
    for backend in ("xformers", "reference"):
        q, k, v = (t.detach().requires_grad_() for t in tensors(1))
        out, lse = attend(q, k, v, plan, return_lse=True, backend=backend)
        some = lse.isfinite()
        (out.square().sum() + lse[some].sum()).backward()
        grads[backend] = [t.grad for t in (q, k, v)]
    for got, expected in zip(grads["xformers"], grads["reference"], strict=True):
        assert got is not None and expected is not None
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_partial_blocks_need_a_bias(install: Callable[[Attention], None]) -> None:
    install(no_bias)
    compare(*tensors(), make_plan("whole"))
    with pytest.raises(
        ValueError, match=r"partial blocks, which need a bias.*attn_bias type is Tensor.*block-aligned"
    ) as caught:
        attend(*tensors(), make_plan("band"), backend="xformers")
    whole, cut = (
        next(answer for answer in explain(*tensors(), make_plan(kind)) if answer.backend == "xformers")
        for kind in ("whole", "band")
    )
    assert whole.ok and not cut.ok and cut.reason in str(caught.value)


def test_full_memory_is_no_answer(install: Callable[[Attention], None]) -> None:
    """What fails for want of memory is asked again."""
    calls: list[Tensor] = []

    def attention(query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(query)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return memory_efficient_attention_forward_requires_grad(query, *args, **options)

    install(attention)
    with pytest.raises(torch.OutOfMemoryError):
        explain(*tensors(), make_plan("whole"))
    compare(*tensors(), make_plan("whole"))


def test_every_device_is_asked_for_itself(install: Callable[[Attention], None]) -> None:
    asked: list[torch.device] = []

    def attention(query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        asked.append(query.device)
        return memory_efficient_attention_forward_requires_grad(query, *args, **options)

    install(attention)
    for index in (None, 0, 0, None):
        assert check("xformers", Call("cpu", torch.float32, 24, 64, 64, device_index=index)).ok
    assert len(asked) == 2


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_any_default_dtype(default: torch.dtype, stand_in: None, under_default: UnderDefault) -> None:
    q, k, v = tensors()
    plan = make_plan("sinks")

    def run() -> tuple[Tensor, Tensor]:
        return attend(q, k, v, plan, return_lse=True, backend="xformers")

    for found, expected in zip(under_default(default, run), run(), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_rows_with_partial_blocks_are_read_together(stand_in: None) -> None:
    def reads_and_rows(block_q: int) -> tuple[int, int]:
        plan = make_plan("sinks", block_q=block_q)
        reads = single_reads(lambda: xformers_backend.xformers_attention(*tensors(), plan, 0.3))
        return reads, int((plan.full_counts < plan.counts).sum())

    (few_reads, few_rows), (many_reads, many_rows) = reads_and_rows(128), reads_and_rows(32)
    assert few_rows < many_rows and few_reads == many_reads


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (cpu_only, r"no operator for it \(device=cpu .*'cuda'\}\); operator wasn't built.*use backend='gather'"),
        (broken, r"fails on a tiny call \(RuntimeError: CUDA error: no kernel image is available\)"),
    ],
)
def test_present_but_of_no_use(function: Attention, reason: str, install: Callable[[Attention], None]) -> None:
    install(function)
    with pytest.raises(ValueError, match=f"xformers attention backend cannot run this call: xformers .*{reason}"):
        attend(*tensors(), make_plan("whole"), backend="xformers")


def test_absent(monkeypatch: pytest.MonkeyPatch, install: Callable[[Attention], None]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xformers" else found(name))
    xformers_problem.cache_clear()
    with pytest.raises(ValueError, match=r"not installed; run: pip install xformers"):
        attend(*tensors(), make_plan("whole"), backend="xformers")


def test_does_not_import(install: Callable[[Attention], None], monkeypatch: pytest.MonkeyPatch) -> None:
    install(cpu_only)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "does not import (ModuleNotFoundError" in check("xformers", Call("cpu", torch.float32, 24, 64, 64)).reason


def test_never_chosen_unasked(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {answer.backend: answer for answer in explain(*tensors(), make_plan("whole"))}
    assert answers["xformers"].ok and "only if named" in answers["xformers"].reason
    for installed in (True, False):
        monkeypatch.setattr(support, "_triton_installed", lambda answer=installed: answer)
        for device in ("cpu", "cuda", "mps"):
            assert choose_backend(device, torch.float16, 64, make_plan("whole")).backend != "xformers"


def real_source() -> str:
    """Source of `xformers.ops.fmha`, from the installed package or the wheel that XFORMERS_WHEEL names."""
    path = "xformers/ops/fmha/__init__.py"
    if wheel := os.environ.get("XFORMERS_WHEEL"):
        return zipfile.ZipFile(wheel).read(path).decode()
    spec = importlib.util.find_spec("xformers")
    if spec is None or spec.origin is None:
        pytest.skip("xformers is not installed; XFORMERS_WHEEL may name a wheel to read instead")
    return (Path(spec.origin).parent.parent / path).read_text()


def test_stand_in_has_the_real_signature() -> None:
    name = memory_efficient_attention_forward_requires_grad.__name__
    functions = [node for node in ast.parse(real_source()).body if isinstance(node, ast.FunctionDef)]
    arguments = next(node.args for node in functions if node.name == name)
    names = inspect.getfullargspec(memory_efficient_attention_forward_requires_grad)
    assert [argument.arg for argument in arguments.args] == names.args
    assert [argument.arg for argument in arguments.kwonlyargs] == names.kwonlyargs
    assert [ast.literal_eval(value) for value in arguments.defaults] == list(names.defaults or ())
