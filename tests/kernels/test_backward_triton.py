"""The Triton backward kernels: under the interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import backward_cases
from .test_triton import run_python

pytest.importorskip("triton")

from dit_accel.kernels.triton_kernels.offline import compile_backward

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Results of backward_cases.py."""
    results: dict[str, str] = json.loads(run_python(str(backward_cases.__file__), TRITON_INTERPRET="1"))
    return results


@pytest.mark.parametrize("case", [case.__name__ for case in backward_cases.CASES])
def test_interpreted_kernels(case: str, interpreted: dict[str, str]) -> None:
    assert interpreted[case] == "ok", interpreted[case]


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles for real, whatever the user's Triton cache holds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("kernel", ["dq", "dkv"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", [AMPERE, HOPPER, BLACKWELL])
def test_default_configuration_does_not_spill(capability: tuple[int, int], head_dim: int, kernel: str) -> None:
    # A banded kernel with a short tail holds every branch.
    report = compile_backward(kernel, capability, head_dim=head_dim, short_tail=True, banded=True)
    assert report.spill_bytes == 0
    assert 0 < report.registers <= 255
    assert report.uses("HGMMA") == (capability == HOPPER)
    # The largest program a GPU of this generation can hold.
    assert report.shared_bytes <= (163 if capability == AMPERE else 227) * 1024


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("kernel", ["dq", "dkv"])
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_blocks_of_64_do_not_spill(capability: tuple[int, int], kernel: str) -> None:
    report = compile_backward(kernel, capability, block_q=64, block_kv=64, short_tail=True, banded=True)
    assert report.spill_bytes == 0


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_delta_does_not_spill(dtype: str) -> None:
    assert compile_backward("delta", HOPPER, dtype=dtype).spill_bytes == 0
