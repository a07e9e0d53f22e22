"""The residual loop of the Triton kernel: under the interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from .interpreter_runner import interpreted
from .residual_cases import CASES

pytest.importorskip("triton")

from dit_accel.kernels.pair_tests import PairKind
from dit_accel.kernels.triton_kernels.centroids import listed_kernel
from dit_accel.kernels.triton_kernels.offline import compile_forward, compile_kernel

AMPERE, HOPPER = (8, 0), (9, 0)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Results of residual_cases.py."""
    return interpreted("residual_cases")


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_interpreted_kernel(case: str, results: dict[str, str]) -> None:
    assert results[case] == "ok", results[case]


@pytest.mark.parametrize(
    ("head_dim", "block", "predicate"),
    [
        (64, 128, PairKind.NONE),
        (128, 128, PairKind.NONE),
        (128, 128, PairKind.BAND),
        (128, 64, PairKind.NONE),
    ],
)
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_residual_does_not_spill(
    capability: tuple[int, int],
    head_dim: int,
    block: int,
    predicate: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Compiled for real, whatever the user's Triton cache holds.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    report = compile_forward(
        capability,
        head_dim=head_dim,
        block_q=block,
        block_kv=block,
        short_tail=True,
        predicate=predicate,
        residual=True,
    )
    assert report.spill_bytes == 0
    assert 0 < report.registers <= 255
    assert report.uses("HGMMA") == (capability == HOPPER)
    # The largest program a GPU of this generation can hold.
    assert report.shared_bytes <= (163 if capability == AMPERE else 227) * 1024


def test_map_of_listed_blocks_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compile_kernel(listed_kernel, HOPPER, "bf16", {"TILE": 128}, 4, 1).spill_bytes == 0
