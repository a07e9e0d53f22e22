"""The options of the pointer kernel, under Triton's interpreter."""

from __future__ import annotations

import gc

import pytest
import torch

from .interpreter_runner import interpreted

pytest.importorskip("triton")

from dit_accel.kernels.triton_kernels import options
from dit_accel.kernels.triton_kernels.options import KernelOptions, largest_norms, longest_first

from .option_cases import CASES


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Results of option_cases.py."""
    return interpreted("option_cases")


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_interpreted_kernel(case: str, results: dict[str, str]) -> None:
    assert results[case] == "ok", results[case]


def test_unknown_softmax_is_refused() -> None:
    with pytest.raises(ValueError, match="online, lazy, static"):
        KernelOptions(softmax="fast")


def test_lazy_is_refused_where_it_does_not_compile() -> None:
    lazy = KernelOptions(softmax="lazy")
    with pytest.raises(ValueError, match="sm_100"):
        lazy.check(torch.bfloat16, (10, 0))
    for capability in ((9, 0), (12, 0), None):
        lazy.check(torch.float16, capability)


def test_the_order_is_forgotten_with_its_plan() -> None:
    held = len(options._orders)
    counts = torch.tensor([[[3, 9, 9, 0]]], dtype=torch.int32)
    assert longest_first(counts).tolist() == [[[1, 2, 0, 3]]]
    assert len(options._orders) == held + 1
    del counts
    gc.collect()
    assert len(options._orders) == held


def test_no_order_is_kept_that_a_capture_only_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    counts = torch.tensor([[[3, 9]]], dtype=torch.int32)
    assert longest_first(counts).tolist() == [[[1, 0]]] and counts not in options._orders
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    longest_first(counts)
    assert counts in options._orders


def test_largest_norms() -> None:
    k = torch.randn(2, 9, 3, 8).to(torch.bfloat16).transpose(1, 2)
    torch.testing.assert_close(largest_norms(k), k.double().norm(dim=-1).amax(-1).float())
