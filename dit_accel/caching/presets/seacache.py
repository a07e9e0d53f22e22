"""SeaCache (arXiv 2602.18993)."""

from __future__ import annotations

from torch import nn

from ..limits import Limits
from ..policies.spectral import Spectral
from ..predictors.reuse import Reuse
from ..predictors.taylor import Taylor
from ..recipe import Cache
from ..scopes.blocks import Whole

#: Where frames stand before channels.
_AXES = {"CogVideoXTransformer3DModel": (1, 3, 4)}


def seacache(
    root: nn.Module | None = None,
    *,
    threshold: float = 0.25,
    exponent: float = 3.0,
    order: int = 1,
    warmup: int | float = 1,
    cooldown: int | float = 1,
    max_consecutive: int | None = 2,
) -> Cache:
    """Skips all blocks while the filtered latents change little, summed over steps.

    arXiv 2602.18993, with the defaults of diffusers' ``SeaCacheConfig``. The residual of all blocks is extrapolated
    over the true gaps. No calibration.

    Args:
        root: the model, which says where its latents have frames, height and width.
        threshold: larger reuses more.
        exponent: of the power of clean signals over frequency.
        order: 1 extrapolates the residual, 0 reuses it.
        warmup: first steps that are computed.
        cooldown: last steps that are computed.
        max_consecutive: how many steps in a row may be reused.

    Raises:
        ValueError: for settings out of range; at the first call, where the scheduler says no noise levels.
    """
    if order not in (0, 1):
        raise ValueError(f"order is 0 or 1; got {order!r}")
    policy = Spectral(threshold, exponent, _AXES.get(type(root).__name__))
    limits = Limits(warmup=warmup, cooldown=cooldown, max_consecutive=max_consecutive)
    predictor = Taylor(1, kappa=None) if order else Reuse()
    return Cache(Whole(), policy, predictor, limits, name="seacache")
