"""The search kernels under Triton's interpreter, and compiled for data-centre GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dit_accel

pytest.importorskip("triton")

from dit_accel.kernels.search.offline import SEARCH_KERNELS, compile_search

ROOT = Path(dit_accel.__file__).parents[1]
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
CASES = (
    "mass_float32_odd_lengths",
    "mass_blocks_wider_than_tiles",
    "mass_whole_blocks",
    "mass_unusual_blocks",
    "mass_padded_head_dims",
    "mass_scale_and_short_lengths",
    "mass_large_scores",
    "mass_views_of_a_fused_projection",
    "mass_every_second_query",
    "mass_of_queries_without_keys_is_zero",
    "means_of_odd_lengths",
    "pooled_and_sub_block_scores",
    "plans_agree",
    "unfit_calls_are_refused",
    "auto_does_not_interpret",
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Results of search_cases.py."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    script = str(Path(__file__).with_name("search_cases.py"))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results: dict[str, str] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(case: str, interpreted: dict[str, str]) -> None:
    assert interpreted[case] == "ok", interpreted[case]


def test_every_case_is_looked_at(interpreted: dict[str, str]) -> None:
    assert set(interpreted) == set(CASES)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", [AMPERE, HOPPER, BLACKWELL])
@pytest.mark.parametrize("kernel", SEARCH_KERNELS)
def test_kernel_does_not_spill(
    kernel: str, capability: tuple[int, int], head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled for real, whatever the user's Triton cache holds.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    report = compile_search(kernel, capability, head_dim=head_dim)
    assert report.spill_bytes == 0
    assert 0 < report.registers <= 255
    assert report.uses("HGMMA") == (capability == HOPPER and kernel != "block_means")


@pytest.mark.parametrize("kernel", ["row_lse", "block_mass"])
@pytest.mark.parametrize(("head_dim", "block"), [(128, 64), (40, 128), (256, 128)])
def test_other_shapes_do_not_spill(
    kernel: str, head_dim: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    report = compile_search(kernel, AMPERE, dtype="fp16", head_dim=head_dim, block_q=block, block_kv=block)
    assert report.spill_bytes == 0
    # What consumer cards hold per program.
    assert report.shared_bytes <= 99 * 1024


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="row_lse"):
        compile_search("softmax", HOPPER)
