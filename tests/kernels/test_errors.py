"""What attend refuses, and how backends explain themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels import attend as attend_module
from dit_accel.kernels import support
from dit_accel.kernels.attend import BACKENDS, attend, choose_backend, explain
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def make_plan(tokens: int = 128, batch: int = 1, heads: int = 1, block: int = 64) -> SparsePlan:
    rows = -(-tokens // block)
    keep = torch.ones(batch, heads, rows, rows, dtype=torch.bool)
    return plan_from_blocks(keep, q_len=tokens, kv_len=tokens, block_q=block, block_kv=block)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 128, 32), torch.randn(2, 4, 128, 32), torch.randn(2, 4, 128, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \[batch, heads, tokens, head_dim\]"),
        (lambda q, k, v: (q, k, v[0]), "v must be"),
        (lambda q, k, v: (q.double(), k, v), "q is torch.float64; accepted are"),
        (lambda q, k, v: (q, k.half(), v), "but k is torch.float16"),
        (lambda q, k, v: (q, k, v.to("meta")), "v is torch.float32 on meta"),
        (lambda q, k, v: (q, k[:, :2], v[:, :2]), "Repeat key heads"),
        (lambda q, k, v: (q, k, v[..., :16]), "do not fit together"),
        (lambda q, k, v: (q[:1], k, v), "do not fit together"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "must be at least 1"),
        (lambda q, k, v: (q[:, :, :100], k, v), "The plan is for 128 queries and 128 keys, the tensors hold 100"),
    ],
)
@pytest.mark.parametrize("call", [attend, explain])
def test_tensors_that_do_not_fit(change: Change, message: str, call: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=message):
        call(*change(*tensors()), make_plan())


@pytest.mark.parametrize("plan", [make_plan(batch=3), make_plan(heads=2)])
def test_lists_that_do_not_fit(plan: SparsePlan) -> None:
    with pytest.raises(ValueError, match="The plan has lists for"):
        attend(*tensors(), plan)


def test_plan_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"plan\.to\(q\.device\)"):
        attend(*tensors(), make_plan().to("meta"))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        attend(*tensors(), make_plan(), scale=scale)


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cudnn'.*triton, gather, reference"):
        attend(*tensors(), make_plan(), backend="cudnn")


def test_explain_covers_every_backend() -> None:
    answers = explain(*tensors(), make_plan())
    assert tuple(answer.backend for answer in answers) == BACKENDS
    assert [answer.ok for answer in answers] == [False, True, True, True, False]
    with pytest.raises(ValueError, match="cannot run this call") as caught:
        attend(*tensors(), make_plan(), backend="triton")
    assert answers[0].reason in str(caught.value)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_triton_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("dtype", support.DTYPES)
def test_auto_takes_triton_on_a_gpu(dtype: torch.dtype) -> None:
    answer = choose_backend("cuda", dtype, 128, make_plan())
    assert answer.backend == "triton" and answer.ok


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("device", "dim", "block", "reason"),
    [("cpu", 64, 64, "needs a CUDA or ROCm GPU"), ("cuda", 512, 64, "above 256"), ("cuda", 64, 40, "multiple of 16")],
)
def test_auto_says_why_not_triton(device: str, dim: int, block: int, reason: str) -> None:
    answer = choose_backend(device, torch.float32, dim, make_plan(block=block))
    assert answer.backend == "gather" and answer.ok
    assert "not triton" in answer.reason and reason in answer.reason


def test_auto_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_triton_installed", lambda: False)
    answer = choose_backend("cuda", torch.float16, 64, make_plan())
    assert answer.backend == "gather" and "pip install triton" in answer.reason


def turned(x: Tensor) -> Tensor:
    """The same values, the head dimension not contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    ("orders", "place", "ok"),
    [
        ((), 0, False),
        ((), 2, False),
        (("order",), 0, True),
        (("order",), 1, True),
        (("kv_order",), 0, False),
        (("kv_order",), 2, True),
        (("order", "kv_order"), 0, True),
    ],
)
def test_explain_judges_strides_as_backends_meet_them(
    orders: tuple[str, ...], place: int, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has an order is permuted first, into memory of its own."""
    monkeypatch.setattr(support, "_triton_installed", lambda: True)
    monkeypatch.setattr(support, "interpreting", lambda: True)
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {name: torch.randperm(128, generator=generator) for name in orders}
    plan = replace(make_plan(), **given)
    q, k, v = (turned(x) if i == place else x for i, x in enumerate(tensors()))
    answer = explain(q, k, v, plan)[0]
    assert answer.backend == "triton" and answer.ok == ok
    assert ("last stride 1" in answer.reason) != ok


@pytest.mark.parametrize(("device", "stride", "copied"), [("cuda", 7, True), ("cuda", 1, False), ("cpu", 7, False)])
def test_what_a_gpu_cannot_read_is_copied(device: str, stride: int, copied: bool) -> None:
    copy: Any = object()
    tensor: Any = SimpleNamespace(
        device=torch.device(device), stride=lambda dim: (1, 1, 1, stride)[dim], contiguous=lambda: copy
    )
    assert attend_module._readable(tensor) is (copy if copied else tensor)


@pytest.mark.parametrize(("backend", "asked"), [("auto", 3), ("gather", 0), ("reference", 0)])
def test_only_auto_copies(backend: str, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    monkeypatch.setattr(attend_module, "_readable", noted)
    attend(*tensors(), make_plan(), backend=backend)
    assert len(seen) == asked
