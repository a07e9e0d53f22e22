"""Column lists name every listed block once, in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.invert import invert_lists
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks


def make_plan(lead: tuple[int, int], rows: int, cols: int, banded: bool, density: float = 0.5) -> SparsePlan:
    generator = torch.Generator().manual_seed(rows + cols)
    keep = torch.rand(*lead, rows, cols, generator=generator) < density
    band = Band(rows * 4, torch.tensor([0], dtype=torch.int32), rows * 4) if banded else None
    partial = keep & (torch.rand(rows, cols, generator=generator) < 0.5) if banded else None
    sizes: dict[str, Any] = {"q_len": rows * 4 - 1, "kv_len": cols * 4 - 3, "block_q": 4, "block_kv": 4}
    if banded:
        sizes["kv_len"] = min(sizes["kv_len"], rows * 4)
    return plan_from_blocks(keep, partial=partial, pair_test=band, **sizes)


def by_loops(plan: SparsePlan, full: Tensor, b: int, h: int, column: int) -> tuple[list[int], list[int]]:
    """FULL and PARTIAL rows of one column, read off the lists entry by entry."""
    found: tuple[list[int], list[int]] = [], []
    for row in range(plan.num_q_blocks):
        for slot in range(int(plan.counts[b, h, row])):
            if plan.indices[b, h, row, slot] == column:
                found[slot >= int(full[b, h, row])].append(row)
    return found


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize(
    ("lead", "rows", "cols"), [((1, 1), 6, 6), ((1, 2), 7, 4), ((2, 1), 4, 4), ((2, 3), 5, 3), ((1, 1), 1, 1)]
)
def test_against_loops(lead: tuple[int, int], rows: int, cols: int, banded: bool) -> None:
    plan = make_plan(lead, rows, cols, banded)
    full = plan.full_counts if banded else plan.counts
    columns = invert_lists(plan.indices, plan.counts, full, plan.num_kv_blocks)
    assert columns.rows.dtype == columns.bounds.dtype == torch.int32
    assert columns.rows.shape == (*lead, plan.num_q_blocks * plan.indices.shape[-1])
    for b in range(lead[0]):
        for h in range(lead[1]):
            bounds = columns.bounds[b, h].tolist()
            assert bounds[0] == 0 and bounds[-1] == plan.counts[b, h].sum()
            assert columns.rows[b, h, bounds[-1] :].eq(0).all()
            for column in range(plan.num_kv_blocks):
                begin, middle, end = bounds[2 * column : 2 * column + 3]
                listed = columns.rows[b, h].tolist()
                assert (listed[begin:middle], listed[middle:end]) == by_loops(plan, full, b, h, column)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_lists(density: float) -> None:
    plan = make_plan((1, 2), 5, 6, False, density)
    columns = invert_lists(plan.indices, plan.counts, plan.counts, plan.num_kv_blocks)
    heights = columns.bounds[..., 2::2] - columns.bounds[..., :-2:2]
    assert heights.eq(5 * density).all()


def test_stays_on_the_device() -> None:
    # Meta tensors hold no values: any read-back, and any shape that depends on values, raises.
    plan = make_plan((2, 3), 5, 4, True).to("meta")
    columns = invert_lists(plan.indices, plan.counts, plan.full_counts, plan.num_kv_blocks)
    assert columns.rows.device.type == columns.bounds.device.type == "meta"
