"""`cell_plan` by itself: what it refuses. What it chooses is tested with VMoBA (`tests/processors/test_vmoba.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.kernels.search.cell_plan import cell_plan
from dit_accel.kernels.search.cells import grid_cells


def test_bitmaps_of_crowded_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 x 24 tokens in cells of 3 x 3: 64 tokens hold parts of 8 or 9 of them."""
    q, k = torch.randn(2, 1, 576, 3, 8)
    cut, whole = (grid_cells((1, 24, 24), (1, 3, 3), block_q=64, block_kv=64, cut=each) for each in (True, False))
    taken = 4 * 3 * 9 * cut.crowded.numel() * 64 * 2  # words, heads, blocks of queries and their rows, two words each
    assert cut.crowded.numel() == 9
    settings: Any = {"select": "threshold", "scope": "head", "amount": 0.25}
    monkeypatch.setattr("dit_accel.kernels.search.cell_plan.CUT_BYTES", taken)
    cell_plan(q, k, cut, **settings)
    monkeypatch.setattr("dit_accel.kernels.search.cell_plan.CUT_BYTES", taken - 1)
    with pytest.raises(ValueError, match=r"9 blocks of keys hold more than 5 cells.*boundaries='keep'"):
        cell_plan(q, k, cut, **settings)
    cell_plan(q, k, whole, **settings)
