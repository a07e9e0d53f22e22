"""TaylorSeer (arXiv 2503.06923) on what the whole stack of blocks gives: its light form."""

from __future__ import annotations

from typing import Literal

from ..limits import Limits
from ..policies.static import Interval
from ..predictors.taylor import Along, Taylor
from ..recipe import Cache
from ..scopes.base import Scope
from ..scopes.blocks import Whole
from ..scopes.output import Output


def taylorseer_lite(
    *,
    interval: int = 6,
    order: int = 1,
    first_enhance: int = 3,
    keep: Literal["residual", "output"] = "residual",
    along: Along = "step",
    kappa: float | None = None,
) -> Cache:
    """The first steps are computed, then one in ``interval``; the others are extrapolated by the paper's formula.

    Args:
        interval: distance of computed steps; 6 is what the paper's code takes for FLUX.
        order: of the expansion, 1 to 4; it keeps ``order + 1`` values. 1 is what the paper's code takes for FLUX.
        first_enhance: first steps that are all computed, at least 1.
        keep: ``"residual"``: what all blocks add; ``"output"``: what the model gives, far smaller, and then nothing of
            the model runs.
        along: what gaps are measured in: ``"step"``, its index, as the paper does; ``"sigma"``, its noise level; or
            ``"log_snr"`` (:class:`~dit_accel.caching.predictors.taylor.Taylor`).
        kappa: bound on the change of each token (:class:`~dit_accel.caching.predictors.clip.Clipped`); None for none,
            as in the paper.

    Raises:
        ValueError: for settings out of range.
    """
    if isinstance(first_enhance, bool) or not isinstance(first_enhance, int) or first_enhance < 1:
        raise ValueError(f"first_enhance counts first steps that are computed, from 1; got {first_enhance!r}")
    if keep not in ("residual", "output"):
        raise ValueError(f'keep is "residual" or "output"; got {keep!r}')
    scope: Scope = Whole() if keep == "residual" else Output(residual=False)
    predictor = Taylor(order, along, "taylorseer", kappa)
    policy, limits = Interval(interval, first_enhance - 1), Limits(warmup=first_enhance)
    return Cache(scope, policy, predictor, limits, name="taylorseer_lite")
