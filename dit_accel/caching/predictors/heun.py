"""Forecast, then calibrate: a trapezoid rule through the latest computed values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Kept, Place, Predictor
from .clip import USUAL_KAPPA, check_kappa, clip
from .taylor import Along, Taylor, check_along, combine, coordinate, distinct_places


@dataclass(frozen=True)
class Heun(Predictor):
    """Heun's rule on the path of a value, in the manner of FoCa (arXiv 2508.16211), over true gaps.

    With the latest values at ``t_c > t_cc > t_ccc`` (in whatever order time runs) and the skipped step ``t``:

    1. Slope ``f_c`` at ``t_c`` of the parabola through the three: the second backward difference formula.
    2. Forecast ``Y~ = Y_c + (t - t_c) f_c``.
    3. Slope ``f~`` at ``t`` by the same formula, of ``Y~``, ``Y_c`` and ``Y_cc``.
    4. Calibrate: ``Y^ = Y_c + (t - t_c) / 2 (f_c + f~)``.

    Straight paths are met exactly. Of the curvature a share is used that falls with the length of the skip, from a
    half: ``g / (2 (k + g))`` after ``k`` steps, where ``g`` is the latest gap. So long skips do not overshoot as
    parabolas do.

    This is not what cache-dit does under that name. There the difference of the latest two computed values counts as
    the slope per step however many steps lie between them, which overshoots by that factor once gaps exceed 1; the
    other slope is taken between values that were predicted themselves, so it depends on how many calls there were; and
    beyond three skipped steps the prediction is drawn back to the latest value. Here all slopes are over true gaps and
    of computed values, and nothing is kept but those.

    Attributes:
        along: what gaps are measured in, as in :class:`~dit_accel.caching.predictors.taylor.Taylor`.
        kappa: bound on the change of each token (:class:`~dit_accel.caching.predictors.clip.Clipped`); None for none.

    Raises:
        ValueError: settings outside these ranges; at prediction, if the scheduler lists no noise levels to go along.
    """

    along: Along = "step"
    kappa: float | None = USUAL_KAPPA
    depth = 3

    def __post_init__(self) -> None:
        check_along(self.along)
        check_kappa(self.kappa)

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """See :meth:`Predictor.predict`; a line through two values."""
        at, times = coordinate(place, self.along), [coordinate(item.place, self.along) for item in kept[:3]]
        used = distinct_places(times, at)
        if len(used) < 3:
            return Taylor(1, self.along, kappa=self.kappa).predict([kept[index] for index in used], place)
        weights = heun_weights(times, at)
        return clip(combine([item.value for item in kept[:3]], weights), kept, self.kappa)

    def lowered(self) -> Predictor:
        """The line through two values."""
        return Taylor(1, self.along, kappa=self.kappa)


def heun_weights(times: Sequence[float], at: float) -> list[float]:
    """What each of three values counts; they sum to 1."""
    latest, before, _ = times
    if at == latest:
        return [1.0, 0.0, 0.0]
    skip = at - latest
    slope = _end_slope(times)
    forecast = [float(index == 0) + skip * part for index, part in enumerate(slope)]
    new, old, older = _end_slope((at, latest, before))
    calibrated = [new * forecast[0] + old, new * forecast[1] + older, new * forecast[2]]
    return [float(index == 0) + skip / 2 * (a + b) for index, (a, b) in enumerate(zip(slope, calibrated, strict=True))]


def _end_slope(times: Sequence[float]) -> tuple[float, float, float]:
    """What three values count in the slope of their parabola at the first of them."""
    near, far = times[0] - times[1], times[0] - times[2]
    return 1 / near + 1 / far, -far / (near * (far - near)), near / (far * (far - near))
