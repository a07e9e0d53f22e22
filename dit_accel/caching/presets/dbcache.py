"""Dual block cache and block-wise pruning of cache-dit (github.com/vipshop/cache-dit, 1.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..limits import Limits
from ..policies.base import Policy
from ..policies.probe import ProbeDiff
from ..policies.prune import UnitDiff
from ..policies.scm import ScmMask
from ..policies.static import Static
from ..predictors.base import Predictor
from ..predictors.reuse import Reuse
from ..predictors.taylor import Taylor
from ..recipe import Cache
from ..scopes.blocks import EachBlock, Tail


def dbcache(
    *,
    threshold: float = 0.08,
    front: int = 8,
    back: int = 0,
    warmup: int | float = 8,
    max_cached_steps: int | None = None,
    max_consecutive: int | None = None,
    order: int = 0,
    mask: str | Sequence[bool | int] | None = None,
    mask_policy: Literal["dynamic", "static"] = "dynamic",
) -> Cache:
    """Skips the middle blocks while what the first ones add is much as it was at the latest computed step.

    The residual of the skipped blocks is reused or extrapolated; then the last blocks run.

    Args:
        threshold: on the relative change of what the first blocks add; larger reuses more.
        front: first blocks, which always run.
        back: last blocks, which always run.
        warmup: first steps that are computed.
        max_cached_steps: how many steps may be reused in all; None for any number.
        max_consecutive: how many steps in a row may be reused; None for any number.
        order: 0 reuses the residual, 1 and more extrapolate it (TaylorSeer).
        mask: a step computation mask: 1 computes, 0 may be reused; or the name of one, ``"slow"``, ``"medium"``,
            ``"fast"``, ``"ultra"``.
        mask_policy: whether steps with a 0 are reused where the change is small (``"dynamic"``), or always
            (``"static"``).

    Raises:
        ValueError: for settings out of range; on a model with too few blocks, when it is put on.
    """
    policy: Policy = ProbeDiff(threshold, blocks=front)
    if mask_policy not in ("dynamic", "static"):
        raise ValueError(f'mask_policy is "dynamic" or "static"; got {mask_policy!r}')
    if mask is not None:
        by_mask = as_mask(mask)
        policy = by_mask | policy if mask_policy == "dynamic" else by_mask
    limits = Limits(warmup=warmup, max_total=max_cached_steps, max_consecutive=max_consecutive)
    return Cache(Tail(front, back), policy, predictor_of(order), limits, name="dbcache")


def prune(
    *,
    threshold: float = 0.08,
    front: int = 8,
    back: int = 0,
    warmup: int | float = 8,
    dynamic: bool = False,
    relax: float = 1.25,
    max_threshold: float | None = None,
    max_consecutive: int | None = None,
) -> Cache:
    """Skips each block whose input changed little since the block was last computed (DBPrune).

    The residual of the block is reused. Keeps two tensors for every block.

    Args:
        threshold: on the relative change of a block's input; larger reuses more.
        front: first blocks, which always run.
        back: last blocks, which always run.
        warmup: first steps that are computed.
        dynamic: whether the mean change of the first blocks of a step, times ``relax``, raises the threshold.
        relax: factor on that mean.
        max_threshold: bound on what it is raised to; None for twice the threshold.
        max_consecutive: how many steps in a row may be reused; None for any number.

    Raises:
        ValueError: for settings out of range; on a model with too few blocks, when it is put on.
    """
    policy = UnitDiff(threshold, dynamic=dynamic, relax=relax, most=max_threshold)
    limits = Limits(warmup=warmup, max_consecutive=max_consecutive)
    return Cache(EachBlock(front, back), policy, limits=limits, name="prune")


def as_mask(mask: str | Sequence[bool | int]) -> Policy:
    """The policy of a step computation mask, or of the name of one."""
    return ScmMask(mask) if isinstance(mask, str) else Static(mask=tuple(mask))


def predictor_of(order: int) -> Predictor:
    """Reuse for order 0, else extrapolation."""
    return Taylor(order) if order else Reuse()
