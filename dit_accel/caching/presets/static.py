"""Caches that follow a list of steps."""

from __future__ import annotations

from collections.abc import Sequence

from ..policies.base import Policy
from ..policies.static import Interval, Static
from ..recipe import Cache
from ..scopes.blocks import Whole
from .dbcache import as_mask, predictor_of


def static(
    *,
    mask: str | Sequence[bool | int] | None = None,
    compute_steps: Sequence[int] | None = None,
    every: int | None = None,
    start: int = 0,
    steps: int | None = None,
    order: int = 0,
) -> Cache:
    """Skips all blocks at the steps of a list, whatever the picture; without arguments the mask ``"medium"``.

    Masks are those published with cache-dit 1.5 (SCM), for 28 steps and carried over to other numbers.

    Args:
        mask: 1 for each step to compute and 0 to reuse, or ``"slow"``, ``"medium"``, ``"fast"``, ``"ultra"``.
        compute_steps: indices of the steps to compute, instead of a mask.
        every: distance of the steps to compute, instead of a mask.
        start: with ``every``, steps before this one are all computed.
        steps: with ``compute_steps``, the number of steps they were made for.
        order: 0 reuses the residual, 1 and more extrapolate it.

    Raises:
        ValueError: for more than one list.
    """
    if sum(each is not None for each in (mask, compute_steps, every)) > 1:
        raise ValueError("give one of mask, compute_steps and every")
    if (every is None and start) or (compute_steps is None and steps is not None):
        raise ValueError("start goes with every, and steps with compute_steps")
    policy: Policy
    if every is not None:
        policy = Interval(every, start)
    elif compute_steps is not None:
        policy = Static(compute_steps=tuple(compute_steps), steps=steps)
    else:
        policy = as_mask("medium" if mask is None else mask)
    return Cache(Whole(), policy, predictor_of(order), name="static")
