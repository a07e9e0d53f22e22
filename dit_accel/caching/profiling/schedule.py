"""At which steps the background blocks are computed, and how many steps that makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..policies.base import Policy, Sight
from ..policies.static import Interval, Shrinking, Static, StaticJudge
from ..unit import Unit
from .published import DENSE_STEPS, INTERVAL

Schedule = str | Policy | Sequence[int]
"""``"uniform"``, ``"shrinking"``, the steps computed after the dense ones, or any policy."""
NAMES = ("uniform", "shrinking")


def schedule_of(schedule: Schedule, *, dense_steps: int = DENSE_STEPS, interval: int = INTERVAL) -> Policy:
    """The policy that a schedule stands for.

    Args:
        schedule: ``"uniform"``: after the dense steps every ``interval``-th; ``"shrinking"``: at distances from 12
            down to 2 (ProfilingDiT, arXiv 2504.03140); a list of steps that are computed besides the dense ones; or a
            policy, as it is.
        dense_steps: first steps that are all computed.
        interval: of ``"uniform"``.

    Raises:
        ValueError: for another name, or numbers out of range.
    """
    if isinstance(schedule, Policy):
        return schedule
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, int) or dense_steps < 0:
        raise ValueError(f"dense_steps is a number of steps from 0; got {dense_steps!r}")
    if schedule == "uniform":
        return Interval(interval, start=dense_steps)
    if schedule == "shrinking":
        return Shrinking(start=dense_steps)
    if isinstance(schedule, str) or not isinstance(schedule, Iterable):
        raise ValueError(f"schedule is {', '.join(NAMES)}, a list of steps or a policy; got {schedule!r}")
    return Static(compute_steps=(*range(dense_steps), *schedule))


def computed_steps(policy: Policy, steps: int) -> tuple[int, ...]:
    """The steps that a policy computes whatever the model does; the first one always is.

    Raises:
        ValueError: if the policy looks at the model, so that nobody knows beforehand.
    """
    unit, latents = Unit("block 0", "blocks"), torch.zeros(1)
    judge = policy.judge(unit, steps)
    if not isinstance(judge, StaticJudge):
        raise ValueError(
            f"{type(policy).__name__} decides while the model runs, so a speed-up cannot be predicted; take the "
            f"schedule {' or '.join(NAMES)}, or a list of steps"
        )
    sights = (Sight(step, steps, "", "", unit, None, None, latents, None, None) for step in range(steps))
    return tuple(sight.step for sight in sights if sight.step == 0 or judge.wants_compute(sight))
