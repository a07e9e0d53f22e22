"""The log signal-to-noise ratio of sampling steps."""

from __future__ import annotations

import math

_EDGE = 1e-6


def half_log_snr(sigma: float, flow: bool = True) -> float:
    """``log(alpha / sigma)``, the ``lambda`` of DPM-Solver (arXiv 2206.00927); it rises as noise falls.

    Args:
        sigma: noise level as the scheduler lists it.
        flow: whether it is that of flow matching, ``(1 - sigma) signal + sigma noise``; else noise of that size is
            added to the signal.

    Returns:
        ``log((1 - sigma) / sigma)`` or ``-log(sigma)``; levels closer than 1e-6 to pure noise, or to none, count as
        that far.

    Raises:
        ValueError: for a level of flow matching above 1.
    """
    if flow and sigma > 1:
        raise ValueError(
            f"flow matching has noise levels from 0 to 1, and the scheduler says {sigma:g}; give flow=False where the "
            "policy or preset takes it, or choose a rule that needs no noise levels"
        )
    if not flow:
        return -math.log(max(sigma, _EDGE))
    share = min(max(sigma, _EDGE), 1 - _EDGE)
    return math.log((1 - share) / share)


def is_pure_noise(sigma: float, flow: bool = True) -> bool:
    """Whether a level has no signal, so that its ratio is 0: the first step of most flow-matching samplers."""
    return flow and sigma >= 1 - _EDGE
