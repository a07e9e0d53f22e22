"""Predictions: closed forms on plans whose cost is known."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels.sparse_plan import plan_from_blocks
from dit_accel.plan import pipeline_speedup, predicted_speedup, radial_plan
from dit_accel.plan.simulate import KERNEL_EFFICIENCY, assumptions, computed_share


def test_share_counts_short_blocks_by_their_size() -> None:
    keep = torch.tensor([[[[True, False], [True, True]]], [[[True, True], [True, True]]]])
    plan = plan_from_blocks(keep, q_len=20, kv_len=24, block_q=16, block_kv=16)
    # The first of two batch items skips 16 rows times 8 columns out of 480 pairs.
    assert computed_share(plan) == pytest.approx(1 - 16 * 8 / 480 / 2)


def test_share_is_the_density_of_a_block_plan() -> None:
    plan = radial_plan((7, 15, 13), block=32, text_tokens=7)
    assert computed_share(plan) == pytest.approx(plan.density, abs=1e-12)


def test_partial_blocks_cost_as_much_as_full_ones() -> None:
    plan = radial_plan((7, 15, 13), block=32, mask="element")
    whole = plan.to_bool().repeat_interleave(32, -1).repeat_interleave(32, -2)[..., : plan.q_len, : plan.kv_len]
    assert computed_share(plan) == pytest.approx(whole.double().mean().item(), abs=1e-12)
    assert computed_share(plan) > plan.density


@pytest.mark.parametrize("efficiency", [0.5, 0.85, 1.0])
def test_speedup_is_efficiency_over_share(efficiency: float) -> None:
    plan = radial_plan((33, 16, 16))
    assert predicted_speedup(plan, kernel_efficiency=efficiency) == pytest.approx(efficiency / plan.density)


def test_full_plan_is_predicted_slower_than_dense() -> None:
    full = plan_from_blocks(torch.ones(4, 4, dtype=torch.bool), q_len=64, kv_len=64, block_q=16, block_kv=16)
    assert predicted_speedup(full) == pytest.approx(KERNEL_EFFICIENCY)
    assert assumptions()["kernel_efficiency"] == KERNEL_EFFICIENCY


def test_empty_plan_is_infinitely_fast() -> None:
    empty = plan_from_blocks(torch.zeros(2, 2, dtype=torch.bool), q_len=32, kv_len=32, block_q=16, block_kv=16)
    assert predicted_speedup(empty) == float("inf")


@pytest.mark.parametrize(
    ("share", "dense_steps", "density", "efficiency", "expected"),
    [
        (0.80, 0.24, 0.28, 0.8, 1.65),
        (0.80, 0.20, 0.25, 0.9, 1.86),
        (0.80, 0.10, 0.16, 0.9, 2.45),
        (0.607, 0.10, 0.16, 0.9, 1.82),
        (0.85, 0.10, 0.16, 0.9, 2.70),
        (0.0, 0.5, 0.1, 0.9, 1.0),
        (0.9, 1.0, 0.1, 0.9, 1.0),
        (1.0, 0.0, 0.25, 1.0, 4.0),
    ],
)
def test_pipeline_speedup_is_amdahl(
    share: float, dense_steps: float, density: float, efficiency: float, expected: float
) -> None:
    assert pipeline_speedup(share, dense_steps, density, efficiency) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("efficiency", [0.0, -0.1, 1.5])
def test_bad_efficiency_is_refused(efficiency: float) -> None:
    with pytest.raises(ValueError, match="kernel_efficiency must be above 0"):
        predicted_speedup(radial_plan((3, 4, 5)), kernel_efficiency=efficiency)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_shares_outside_zero_to_one_are_refused(position: int) -> None:
    arguments = [0.5, 0.5, 0.5]
    arguments[position] = 1.1
    with pytest.raises(ValueError, match=r"must lie between 0 and 1, got 1\.1"):
        pipeline_speedup(*arguments)
