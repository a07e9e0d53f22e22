"""The whole call, computed at equal distances in log signal-to-noise ratio and time."""

from __future__ import annotations

from ..limits import Limits
from ..policies.snr import SnrGap
from ..predictors.base import Predictor
from ..predictors.reuse import Reuse
from ..predictors.settled import Settled
from ..predictors.taylor import Along, Taylor
from ..recipe import Cache
from ..scopes.output import Output

PACE = 15.0  # a whole generation, in units of lambda, which itself changes by about 8.5 in 50 steps
SETTLE = 0.04  # part of the generation whose outputs turn too sharply for lines


def snr_gap(
    *,
    threshold: float = 2.2,
    order: int = 1,
    pace: float = PACE,
    settle: int | float = SETTLE,
    along: Along = "step",
    cooldown: int | float = 0,
) -> Cache:
    """Computes where noise has fallen, or time has passed, enough since the latest computed step; draws lines between.

    This package's own. Computed steps lie evenly in ``lambda + pace t``: ``lambda`` is half the log signal-to-noise
    ratio (``log((1 - sigma) / sigma)`` in flow matching), along which DPM-Solver (arXiv 2206.00927) places its
    evaluations, and ``t`` the part of the generation that is over. So gaps grow slowly behind the first steps, which
    no line is drawn through, and shrink towards the last ones. It keeps two outputs of the model, far smaller than
    its tokens, looks at noise levels alone and needs no calibration.

    Args:
        threshold: distance of computed steps; larger reuses more. Of 50 steps of flow matching with a shift of 12,
            thresholds of 1.4, 1.7, 2.2, 2.6 and 3.6 compute 15, 13, 10, 9 and 7. At large thresholds single
            generations may differ from dense altogether.
        order: of the extrapolation, 1; 0 reuses the latest output.
        pace: what a whole generation counts; more makes gaps more even.
        settle: first steps whose outputs no line is drawn through; an int counts, a float is a fraction of all.
        along: what gaps of lines are measured in (:class:`~dit_accel.caching.predictors.taylor.Taylor`).
        cooldown: last steps that are computed; an int or a float, too.

    Raises:
        ValueError: for settings out of range; in a run, where the scheduler says no noise levels, or nobody says how
            many steps there are.
    """
    if isinstance(order, bool) or order not in (0, 1):
        raise ValueError(f"order is 0 or 1; got {order!r}")
    line: Predictor = Settled(Taylor(1, along, kappa=None), settle)
    policy, limits = SnrGap(threshold, pace), Limits(cooldown=cooldown)
    return Cache(Output(residual=False), policy, line if order else Reuse(), limits, name="snr_gap")
