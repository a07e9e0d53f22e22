"""Delta-DiT (arXiv 2406.01125)."""

from __future__ import annotations

from ..policies.static import Interval
from ..recipe import Cache
from ..scopes.delta import Delta


def delta_dit(
    *, front: int | float = 0.75, rear: int | float = 0.75, switch: int | float = 0.5, interval: int = 2
) -> Cache:
    """Every ``interval``-th step runs in full; others skip rear blocks early and front blocks late.

    What is kept of the skipped blocks is what they add (the "delta"), so that the input of the step counts in full.

    The paper tunes the switch and the number of blocks for each model and prints 1.6x at 20 steps. Three quarters of
    the blocks at every second step are the arithmetic of that figure, and so the defaults; the switch in the middle is
    ours.

    Args:
        front: blocks to skip late: how many, or a part of all as a float.
        rear: blocks to skip early; likewise.
        switch: first step that skips front blocks: its index, or a part of all steps as a float.
        interval: distance of steps that run in full.

    Raises:
        ValueError: for settings out of range.
    """
    return Cache(Delta(front, rear, switch), Interval(interval), name="delta_dit")
