"""A bound on how far an extrapolation may go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Place, Predictor

#: Leaves a line alone as long as it is continued by at most this many times the gap that it was drawn through: five
#: skipped steps behind two neighboring computed ones, and any regular interval.
USUAL_KAPPA = 6.0


@dataclass(frozen=True)
class Clipped(Predictor):
    """Another predictor, whose change since the last computed value is bounded by the change before it.

    For every token, ``|Y^ - Y_c| <= kappa |Y_c - Y_cc|`` (Euclidean norms over the last axis), where ``Y_c`` and
    ``Y_cc`` are the two latest computed values; a longer change is shortened, its direction stays. Linear
    extrapolation over ``k`` steps from values ``g`` steps apart is not touched while ``k / g <= kappa``. Predictors of
    this package that extrapolate have this bound built in; this one is for others.

    Attributes:
        predictor: the rule.
        kappa: the bound; positive.

    Raises:
        ValueError: if kappa is not positive.
    """

    predictor: Predictor
    kappa: float = USUAL_KAPPA

    def __post_init__(self) -> None:
        check_kappa(self.kappa)
        object.__setattr__(self, "depth", max(2, self.predictor.depth))
        object.__setattr__(self, "needs_probe", self.predictor.needs_probe)
        object.__setattr__(self, "needs_pairs", self.predictor.needs_pairs)

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """See :meth:`Predictor.predict`."""
        return clip(self.predictor.predict(kept[: self.predictor.depth], place, probe), kept, self.kappa)

    def lowered(self) -> Predictor | None:
        """With a lower order of the rule; no bound once one value is left: nothing to measure by."""
        lower = self.predictor.lowered()
        if lower is None:
            return self.predictor if self.predictor.depth < self.depth else None
        return Clipped(lower, self.kappa) if lower.depth > 1 else lower


def clip(predicted: Tensor, kept: Sequence[Kept], kappa: float | None) -> Tensor:
    """The bound of :class:`Clipped`; with one kept value, or no kappa, nothing is bounded."""
    if kappa is None or len(kept) < 2 or predicted is kept[0].value:
        return predicted
    latest = widened(kept[0].value)
    change = predicted - latest
    length = _length(change)
    bound = kappa * _length(latest - kept[1].value)
    share = torch.where(length > bound, bound / length, torch.ones_like(length))
    return torch.where(share < 1, torch.addcmul(latest, share, change), predicted).to(predicted.dtype)


def widened(value: Tensor) -> Tensor:
    """In float32 if it is in half precision, else itself."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def check_kappa(kappa: float | None) -> None:
    """Refuses a bound that is none."""
    if kappa is not None and not kappa > 0:
        raise ValueError(f"kappa is a positive factor such as {USUAL_KAPPA}, or None for no bound; got {kappa}")


def _length(change: Tensor) -> Tensor:
    return change.abs() if change.dim() == 0 else torch.linalg.vector_norm(change, dim=-1, keepdim=True)
