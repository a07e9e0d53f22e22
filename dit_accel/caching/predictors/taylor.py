"""Extrapolation through the latest computed values: TaylorSeer, with true gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ...noise import log_snr
from .base import Kept, Place, Predictor
from .clip import USUAL_KAPPA, check_kappa, clip, widened
from .reuse import Reuse

Along = Literal["step", "sigma", "log_snr"]
Form = Literal["newton", "taylorseer"]

#: Values closer to each other than this share of the distance to bridge count as one place: their difference is noise.
_SAME_PLACE = 1e-3


@dataclass(frozen=True)
class Taylor(Predictor):
    """A polynomial through the ``order + 1`` latest computed values, continued to the skipped step.

    Finite differences are taken over the true gaps between computed steps, which need not be equal. There are two
    forms:

    - ``"newton"``: divided differences ``[t0 .. ti]`` times ``(t - t0) ... (t - t(i-1))``. It reproduces polynomials
      up to the order, whatever the gaps.
    - ``"taylorseer"``: the recursion of TaylorSeer (arXiv 2503.06923) with true gaps, ``D(i+1) = (D(i) - D(i) before)
      / gap``, and ``sum D(i) (t - t0)^i / i!``. On equal gaps it is that paper's formula. From order 2 on it does not
      reproduce polynomials, as its differences estimate derivatives half a gap and more behind ``t0``.

    Order 1 is the same line in both. Values of half precision are combined in float32.

    Attributes:
        order: degree, from 1 to 4; fewer kept values give a lower one.
        along: what the gaps are measured in: the index of the step, its noise level ``sigma``, or the log ratio of
            signal to noise (:func:`dit_accel.noise.log_snr`).
        form: see above.
        kappa: bound on the change of each token (:class:`~dit_accel.caching.predictors.clip.Clipped`); None for none.

    Raises:
        ValueError: settings outside these ranges; at prediction, if the scheduler says no noise levels to go along.
    """

    order: int = 1
    along: Along = "step"
    form: Form = "newton"
    kappa: float | None = USUAL_KAPPA

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or self.order not in (1, 2, 3, 4):
            raise ValueError(f"order is 1, 2, 3 or 4, or take Reuse() for 0; got {self.order!r}")
        check_along(self.along)
        if self.form not in ("newton", "taylorseer"):
            raise ValueError(f'form is "newton" or "taylorseer"; got {self.form!r}')
        check_kappa(self.kappa)
        object.__setattr__(self, "depth", self.order + 1)

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """See :meth:`Predictor.predict`."""
        at, times = coordinate(place, self.along), [coordinate(item.place, self.along) for item in kept[: self.depth]]
        used = distinct_places(times, at)
        used_times = [times[index] for index in used]
        weights = newton_weights(used_times, at) if self.form == "newton" else taylorseer_weights(used_times, at)
        values = [kept[index].value for index in used]
        if used == [0, 1]:  # on a line all tokens meet the bound at the same place
            return combine(values, bounded_line(weights, self.kappa))
        return clip(combine(values, weights), kept, self.kappa)

    def lowered(self) -> Predictor:
        """One order less; the latest value itself below order 1."""
        return Taylor(self.order - 1, self.along, self.form, self.kappa) if self.order > 1 else Reuse()


def check_along(along: str) -> None:
    """Refuses an axis that is none.

    Raises:
        ValueError: naming those there are.
    """
    if along not in get_args(Along):
        raise ValueError(f'along is "step", "sigma" or "log_snr"; got {along!r}')


def coordinate(place: Place, along: Along) -> float:
    """Where a step lies on the axis that gaps are measured on."""
    if along == "step":
        return float(place.step)
    if place.sigma is None:
        raise ValueError('the scheduler says no noise level for a step; predict along="step" instead')
    return log_snr(place.sigma, place.flow) if along == "log_snr" else place.sigma


def distinct_places(times: Sequence[float], at: float) -> list[int]:
    """Indices of the times that are worth a difference: too close to a newer one means noise over nothing."""
    used: list[int] = []
    for index, time in enumerate(times):
        if all(abs(time - times[other]) > _SAME_PLACE * abs(at - times[0]) for other in used):
            used.append(index)
    return used


def newton_weights(times: Sequence[float], at: float) -> list[float]:
    """What each value counts in the polynomial through all of them; they sum to 1."""
    weights = []
    for i, time in enumerate(times):
        weight = 1.0
        for j, other in enumerate(times):
            if j != i:
                weight *= (at - other) / (time - other)
        weights.append(weight)
    return weights


def taylorseer_weights(times: Sequence[float], at: float) -> list[float]:
    """What each value counts in TaylorSeer's recursion over true gaps; they sum to 1."""
    count = len(times)
    differences = [[float(i == j) for j in range(count)] for i in range(count)]  # row i: D at times[i], by value
    weights, factor = list(differences[0]), 1.0
    for order in range(1, count):
        differences = [
            [(a - b) / (times[i] - times[i + 1]) for a, b in zip(differences[i], differences[i + 1], strict=True)]
            for i in range(count - order)
        ]
        factor *= (at - times[0]) / order
        weights = [weight + factor * d for weight, d in zip(weights, differences[0], strict=True)]
    return weights


def combine(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum weights[i] values[i]`` for weights that sum to 1, by differences to the first: equal values stay exact."""
    first = values[0]
    wide = widened(first)
    if len(values) == 1:
        return first
    result = wide.clone()
    for value, weight in zip(values[1:], weights[1:], strict=True):
        result.add_(value - wide, alpha=weight)
    return result.to(first.dtype)


def bounded_line(weights: Sequence[float], kappa: float | None) -> list[float]:
    """The weights of a line through two values, whose change is ``-weights[1]`` times theirs, within the bound."""
    older = weights[1] if kappa is None else max(-kappa, min(kappa, weights[1]))
    return [1 - older, older]
