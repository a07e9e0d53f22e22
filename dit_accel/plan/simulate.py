"""What a plan should save, before anything is run.

These are arithmetic predictions from counts: upper bounds with one assumed constant, the efficiency of the sparse
kernel.  Launch overhead, memory traffic and the building of plans are not in them.  Measure before you believe.
"""

from __future__ import annotations

import torch

from dit_accel.kernels.sparse_plan import SparsePlan

KERNEL_EFFICIENCY = 0.85
"""Assumed: pairs per second of the sparse kernel over those of dense attention on the same device."""


def computed_share(plan: SparsePlan) -> float:
    """Gives the share of all (query, key) pairs that a kernel computes.

    Kernels compute listed blocks whole, so a PARTIAL block costs as much as a FULL one.  The share equals the plan's
    density if there are none.
    """
    heights = _block_lengths(plan.q_len, plan.block_q)
    lengths = _block_lengths(plan.kv_len, plan.block_kv)
    blocks = plan.to_bool().to("cpu", torch.float64)
    return float((heights @ blocks @ lengths).mean()) / (plan.q_len * plan.kv_len)


def predicted_speedup(plan: SparsePlan, *, kernel_efficiency: float = KERNEL_EFFICIENCY) -> float:
    """Predicts how much faster one attention call is with the plan than dense: `kernel_efficiency / computed_share`.

    A plan that keeps everything comes out below 1, as it would.

    Args:
        plan: The plan.
        kernel_efficiency: Speed per pair relative to dense, in (0, 1].

    Returns:
        Dense time over sparse time; infinite for a plan that lists nothing.

    Raises:
        ValueError: The efficiency is out of range.
    """
    _check_efficiency(kernel_efficiency)
    share = computed_share(plan)
    return kernel_efficiency / share if share else float("inf")


def pipeline_speedup(
    attention_share: float, dense_step_fraction: float, density: float, kernel_efficiency: float = KERNEL_EFFICIENCY
) -> float:
    """Predicts how much faster sampling is as a whole (Amdahl's law).

    `1 / ((1 - a) + a * (w + (1 - w) * d / e))`: only the attention share a gets faster, and only on the steps outside
    the dense share w.

    Args:
        attention_share: Share a of the dense run that is spent in the accelerated attention sites, 0 to 1.
        dense_step_fraction: Share w of the steps (and layers) that stay dense, 0 to 1.
        density: Share d of the pairs that is computed on the others, see `computed_share`.
        kernel_efficiency: Speed per pair relative to dense, e, in (0, 1].

    Returns:
        Dense time over accelerated time.

    Raises:
        ValueError: An argument is out of range.
    """
    shares = {"attention_share": attention_share, "dense_step_fraction": dense_step_fraction, "density": density}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}.")
    _check_efficiency(kernel_efficiency)
    attention = dense_step_fraction + (1 - dense_step_fraction) * density / kernel_efficiency
    left = 1 - attention_share + attention_share * attention
    return 1 / left if left else float("inf")


def assumptions() -> dict[str, float | str]:
    """Names what `predicted_speedup` assumes by default, for reports."""
    return {
        "kernel_efficiency": KERNEL_EFFICIENCY,
        "formula": "kernel_efficiency / share of pairs in the computed blocks",
        "scope": "one attention call, an upper bound; not measured",
    }


def _check_efficiency(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"kernel_efficiency must be above 0 and at most 1, got {value}. Typical are 0.7 to 0.9.")


def _block_lengths(length: int, block: int) -> torch.Tensor:
    return (length - torch.arange(0, length, block)).clamp(max=block).to(torch.float64)
