"""The kernels compile without spilling registers for GPUs that are not there.

Every target is compiled here at head dim 128, where registers are scarce, and what is special at its tightest; the
whole matrix takes minutes and runs with DIT_ACCEL_COMPILE_ALL=1.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from dit_accel.kernels.pair_tests import PairKind
from dit_accel.kernels.search.offline import SEARCH_KERNELS, compile_search
from dit_accel.kernels.triton_kernels.generation import SHARED_LIMIT, generation
from dit_accel.kernels.triton_kernels.offline import TARGETS, KernelReport, compile_backward, compile_forward
from dit_accel.kernels.triton_kernels.options import KernelOptions

EVERYTHING = os.environ.get("DIT_ACCEL_COMPILE_ALL") == "1"
ATTENTION = ("forward", "dq", "dkv")
KERNELS = (*ATTENTION, "delta", *SEARCH_KERNELS)
# A banded kernel with a short tail holds every branch.
BRANCHES = {"short_tail": True, "predicate": PairKind.BAND}
OPTIONS = (KernelOptions(True, "lazy"), KernelOptions(True, "static"))

# Kernel, target, head dim.
MATRIX = set(product(KERNELS, TARGETS, (64, 128)))
USUAL = {
    *product(ATTENTION, TARGETS, (128,)),
    *product(ATTENTION, ("sm_80", "sm_90"), (64,)),
    ("dkv", "sm_120", 64),
    *product(("row_lse", "block_mass"), ("sm_80", "sm_90", "gfx942"), (128,)),
    *product(("delta", "block_means"), ("sm_80", "gfx942"), (128,)),
}
# Kernel, target, kind of pair test.
PAIR_TESTS = set(product(ATTENTION, TARGETS, (PairKind.NEIGHBORHOOD, PairKind.PERMUTED_NEIGHBORHOOD, PairKind.BITMAP)))
USUAL_PAIR_TESTS = {
    ("forward", "sm_80", PairKind.PERMUTED_NEIGHBORHOOD),
    ("forward", "sm_80", PairKind.BITMAP),
    ("dkv", "sm_90", PairKind.PERMUTED_NEIGHBORHOOD),
}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles for real, whatever the user's Triton cache holds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel: str, target: str, **facts: Any) -> KernelReport:
    capability = TARGETS[target]
    if kernel == "forward":
        return compile_forward(capability, **facts)
    if kernel in SEARCH_KERNELS:
        return compile_search(kernel, capability, **facts)
    return compile_backward(kernel, capability, **facts)


def check(report: KernelReport, target: str, spills: int = 0) -> None:
    """At most so many spilled bytes per thread, and a program fits the GPU."""
    assert report.spill_bytes <= spills
    assert 0 < report.registers <= (512 if target == "gfx942" else 255)
    assert report.shared_bytes <= SHARED_LIMIT[generation(TARGETS[target])]


@pytest.mark.parametrize(("kernel", "target", "head_dim"), sorted(MATRIX if EVERYTHING else USUAL))
def test_defaults_do_not_spill(kernel: str, target: str, head_dim: int) -> None:
    facts = BRANCHES if kernel in ATTENTION else {}
    report = compiled(kernel, target, head_dim=head_dim, **facts)
    check(report, target)
    multiplies = kernel not in ("delta", "block_means")
    assert report.uses("HGMMA") == (multiplies and target == "sm_90")
    assert ("v_mfma" in report.instructions) == (multiplies and target == "gfx942")


@pytest.mark.parametrize("target", TARGETS if EVERYTHING else ["sm_90"])
def test_the_plain_loop_does_not_spill(target: str) -> None:
    check(compiled("forward", target), target)


@pytest.mark.parametrize(("kernel", "target", "kind"), sorted(PAIR_TESTS if EVERYTHING else USUAL_PAIR_TESTS))
def test_pair_tests_do_not_spill(kernel: str, target: str, kind: PairKind) -> None:
    check(compiled(kernel, target, short_tail=True, predicate=kind), target)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("target", TARGETS if EVERYTHING else ["sm_80", "sm_90"])
def test_options_do_not_spill(target: str, options: KernelOptions) -> None:
    if options.softmax == "lazy" and target == "sm_100":
        pytest.skip("Triton 3.6 cannot compile it, and the options say so")
    check(compiled("forward", target, options=options, **BRANCHES), target)


@pytest.mark.parametrize("kernel", [*ATTENTION, "row_lse", "block_mass"] if EVERYTHING else ["forward", "dkv"])
@pytest.mark.parametrize("target", TARGETS if EVERYTHING else ["sm_80"])
def test_blocks_of_64_do_not_spill(target: str, kernel: str) -> None:
    facts = BRANCHES if kernel in ATTENTION else {}
    check(compiled(kernel, target, block_q=64, block_kv=64, **facts), target)


# What spills after all at unusual head dims, in bytes per thread; 0 elsewhere.
ODD_SPILLS = {("dkv", "sm_90", 40): 8, ("dq", "sm_100", 256): 8}


@pytest.mark.parametrize("kernel", [*ATTENTION, "row_lse", "block_mass"] if EVERYTHING else ["forward", "dkv"])
@pytest.mark.parametrize("head_dim", [40, 72, 256] if EVERYTHING else [256])
@pytest.mark.parametrize("target", TARGETS if EVERYTHING else ["sm_90"])
def test_other_head_dims_hardly_spill(target: str, head_dim: int, kernel: str) -> None:
    facts = BRANCHES if kernel in ATTENTION else {}
    check(
        compiled(kernel, target, dtype="fp16", head_dim=head_dim, **facts),
        target,
        ODD_SPILLS.get((kernel, target, head_dim), 0),
    )


# What spills after all, in bytes per thread; 0 elsewhere.
FLOAT32_SPILLS = {("dq", "sm_89", 128): 24, ("dq", "sm_90", 128): 8, ("dq", "sm_120", 128): 32}


@pytest.mark.parametrize("kernel", [*ATTENTION, "row_lse", "block_mass"] if EVERYTHING else ["forward", "row_lse"])
@pytest.mark.parametrize("head_dim", [64, 128] if EVERYTHING else [128])
@pytest.mark.parametrize("target", TARGETS if EVERYTHING else ["sm_80", "gfx942"])
def test_float32_hardly_spills(target: str, head_dim: int, kernel: str) -> None:
    facts = BRANCHES if kernel in ATTENTION else {}
    report = compiled(kernel, target, dtype="fp32", head_dim=head_dim, **facts)
    assert report.spill_bytes <= FLOAT32_SPILLS.get((kernel, target, head_dim), 0)
    assert report.shared_bytes <= SHARED_LIMIT[generation(TARGETS[target])]


def test_unknown_search_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="row_lse"):
        compile_search("softmax", (9, 0))
