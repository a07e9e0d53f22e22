"""Presets for UNets: DeepCache and T-GATE."""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from typing import Any, Literal

from ..policies.base import Policy
from ..policies.gate import Gate
from ..policies.measure import check_count
from ..policies.static import Interval, Static
from ..predictors.branch_mean import BranchMean
from ..recipe import Cache
from ..scopes.guidance import Guidance
from ..scopes.modules import Attention
from ..scopes.unet import Deep


def deepcache(
    *,
    interval: int = 3,
    branch: int = 0,
    mode: Literal["uniform", "nonuniform"] = "uniform",
    steps: int | None = None,
    center: int = 15,
    power: float = 1.4,
) -> Cache:
    """DeepCache (arXiv 2312.00858): the inside of a UNet is computed every ``interval`` steps.

    Args:
        interval: distance of computed steps; with ``"nonuniform"`` their mean distance.
        branch: where the inside begins (:class:`~dit_accel.caching.scopes.unet.Deep`).
        mode: ``"nonuniform"`` computes more often around step ``center`` (:func:`nonuniform_steps`).
        steps: number of sampling steps, which ``"nonuniform"`` needs to know.
        center: as there.
        power: as there.

    Raises:
        ValueError: for settings out of range; when it is put on, for a model that is no UNet or has other blocks.
    """
    policy: Policy = Interval(interval)
    if mode not in ("uniform", "nonuniform"):
        raise ValueError(f'mode is "uniform" or "nonuniform"; got {mode!r}')
    if mode == "nonuniform":
        if steps is None:
            raise ValueError('mode="nonuniform" is made for a number of sampling steps; give steps=..., such as 50')
        policy = Static(nonuniform_steps(steps, interval, center, power), steps=steps)
    return Cache(Deep(branch), policy, name="deepcache")


def tgate(
    *,
    gate_step: int = 10,
    sp_interval: int = 5,
    fi_interval: int = 1,
    warmup: int = 2,
    single_branch: bool = True,
    root: Any = None,
) -> tuple[Cache, ...]:
    """T-GATE (arXiv 2404.02747): no cross-attention and no guidance from step ``gate_step`` on.

    Args:
        gate_step: first step whose cross-attention is the kept mean of both branches.
        sp_interval: distance of steps whose self-attention is computed before the gate.
        fi_interval: likewise behind it.
        warmup: the last of the first steps whose self-attention is all computed.
        single_branch: whether one branch is run for both behind the gate.
        root: the model, if known.

    Raises:
        ValueError: for a model that is no UNet.
    """
    if root is not None and not hasattr(root, "up_blocks"):
        raise ValueError(
            f"T-GATE gates the cross-attention of UNets, and {type(root).__name__} is none; take the preset pab, or "
            "the scope Guidance(copies=True) to do without guidance from a step on"
        )
    gate = Gate(gate_step, sp_interval, fi_interval, warmup)
    cross = Cache(Attention(("cross",)), gate, BranchMean(), name="tgate-cross")
    own = Cache(Attention(("self",)), gate, name="tgate-self")
    # Innermost, so that the other two see whole batches.
    guidance = Cache(Guidance(copies=True), gate, decide="each", name="tgate-guidance")
    return (guidance, cross, own) if single_branch else (cross, own)


def nonuniform_steps(steps: int, interval: int, center: int = 15, power: float = 1.4) -> tuple[int, ...]:
    """The computed steps of DeepCache's non-uniform 1:N mode: close to each other around a step, rarer away from it.

    The roots ``(-center)^(1/p)`` and ``(steps - center)^(1/p)`` are joined by a line that is divided evenly. Its
    points are raised to p, and ``center`` is added to the whole part of their real part. As in the authors' code the
    root of a negative number is its complex principal one, and p falls by 0.02 until the steps differ from each other.

    Args:
        steps: number of sampling steps.
        interval: mean distance; there are ``ceil(steps / interval)`` computed steps, the first of them step 0.
        center: step around which most is computed, below ``steps``.
        power: first p to try, above 1.

    Raises:
        ValueError: if no p above 1 makes so many different steps.
    """
    check_count("steps", steps)
    check_count("interval", interval)
    count = -(-steps // interval)
    if count == steps:
        return tuple(range(steps))
    if isinstance(center, bool) or not isinstance(center, int) or not 0 <= center < steps:
        raise ValueError(f"center is a step from 0 to {steps - 1}; got {center!r}")
    tried = power
    while tried > 1:
        found = _along_the_line(steps, count, center, tried)
        if len(found) == count:
            return tuple(found)
        tried -= 0.02
    raise ValueError(
        f"no power between 1 and {power} gives {count} different steps of {steps} around {center}; take a larger "
        "power or another center"
    )


def _along_the_line(steps: int, count: int, center: int, power: float) -> Sequence[int]:
    low, high = (complex(end) ** (1 / power) if end else 0j for end in (-center, steps - center))
    points = (low + (high - low) * index / count for index in range(count + 1))
    whole = sorted({int((cmath.exp(power * cmath.log(point)) if point else 0j).real) for point in points})
    return [0, *(offset + center for offset in whole[1:-1])]
