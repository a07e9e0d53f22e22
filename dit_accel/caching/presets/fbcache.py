"""First block cache."""

from __future__ import annotations

from ..limits import Limits
from ..policies.probe import ProbeDiff
from ..recipe import Cache
from ..scopes.blocks import Tail


def fbcache(*, threshold: float = 0.08, warmup: int | float = 0, max_consecutive: int | None = None) -> Cache:
    """Skips all blocks but the first while what the first one adds is much as it was at the latest computed step.

    From ParaAttention (github.com/chengzeyi/ParaAttention, 4de137c) and diffusers' ``FirstBlockCacheConfig``. No
    calibration. The residual of the skipped blocks is reused.

    Args:
        threshold: on the relative change; larger reuses more. Published for FLUX.1: 0.06 to 0.12; diffusers has 0.05.
        warmup: first steps that are computed.
        max_consecutive: how many steps in a row may be reused; None for any number.

    Raises:
        ValueError: for settings out of range, naming the range.
    """
    limits = Limits(warmup=warmup, max_consecutive=max_consecutive)
    return Cache(Tail(1, 0), ProbeDiff(threshold, blocks=1), limits=limits, name="fbcache")
