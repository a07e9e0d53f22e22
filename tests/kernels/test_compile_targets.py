"""The forward kernel compiles for data-centre GPUs without spilling; no GPU needed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from dit_accel.kernels.triton_kernels.offline import compile_forward

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles for real, whatever the user's Triton cache holds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("banded", [False, True], ids=["plain", "banded"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", [AMPERE, HOPPER, BLACKWELL])
def test_default_configuration_does_not_spill(capability: tuple[int, int], head_dim: int, banded: bool) -> None:
    # A banded kernel with a short tail holds every branch; the plain one is the loop that has to be fast.
    report = compile_forward(capability, head_dim=head_dim, short_tail=banded, banded=banded)
    assert report.spill_bytes == 0
    assert 0 < report.registers <= 255
    assert report.uses("HGMMA") == (capability == HOPPER)
    # The largest program a GPU of this generation can hold.
    assert report.shared_bytes <= (163 if capability == AMPERE else 227) * 1024


@pytest.mark.parametrize("head_dim", [40, 72, 256])
def test_padded_head_dims_do_not_spill(head_dim: int) -> None:
    report = compile_forward(HOPPER, dtype="fp16", head_dim=head_dim, short_tail=True)
    assert report.spill_bytes == 0
    assert report.uses("HGMMA")


def test_blocks_of_64_do_not_spill() -> None:
    report = compile_forward(AMPERE, head_dim=128, block_q=64, block_kv=64, short_tail=True, banded=True)
    assert report.spill_bytes == 0
