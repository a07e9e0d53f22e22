"""Dynamic mode decomposition: the values as a sum of modes that grow, fade or turn from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Place, Predictor
from .clip import USUAL_KAPPA, check_kappa, clip, widened
from .taylor import Taylor

#: Fewer evenly spaced values say too little about how they change.
_FEWEST = 4
#: Numbers of each value that are multiplied at a time, to need little memory besides them.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DMD(Predictor):
    """Fits ``Y_(i+1) = A Y_i`` of low rank to the latest computed values and applies ``A`` on (Schmid 2010).

    With ``X = [Y_0 .. Y_(n-2)] = U S V^T``, truncated where singular values fall below ``rank_tolerance`` of the
    largest, ``A~ = U^T [Y_1 .. Y_(n-1)] V S^-1`` and the prediction is ``Y_(n-1) + U (A~^q - 1) U^T Y_(n-1)``, where
    ``q`` is the distance to the skipped step in gaps between computed ones, whole or not. All of this follows from the
    ``n x n`` scalar products of the values (the method of snapshots), so no factor as long as the tokens is ever made;
    the products are read back once per prediction, which waits for the device. Of the values in half precision, whose
    rounding looks like modes of its own, singular values below a quarter of their precision are left out, too.

    Where fewer than 4 of the latest values are evenly spaced, or the fit has no finite answer, it is ``Taylor(1)``.

    Attributes:
        window: how many values are kept, from 4 to 12.
        rank_tolerance: see above; in (0, 1).
        kappa: bound on the change of each token (:class:`~dit_accel.caching.predictors.clip.Clipped`); None for none.

    Raises:
        ValueError: settings outside these ranges.
    """

    window: int = 6
    rank_tolerance: float = 1e-4
    kappa: float | None = USUAL_KAPPA

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or not _FEWEST <= self.window <= 12:
            raise ValueError(f"window counts kept values, from {_FEWEST} to 12; got {self.window!r}")
        if not 0 < self.rank_tolerance < 1:
            raise ValueError(
                f"rank_tolerance is a share of the largest singular value, in (0, 1); got {self.rank_tolerance}"
            )
        check_kappa(self.kappa)
        object.__setattr__(self, "depth", self.window)

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """See :meth:`Predictor.predict`."""
        used = _evenly_spaced(kept[: self.depth])
        weights = None
        if len(used) >= _FEWEST:
            gap = used[0].place.step - used[1].place.step
            products = _products([item.value for item in reversed(used)])
            tolerance = max(self.rank_tolerance, torch.finfo(used[0].value.dtype).eps / 4)
            weights = dmd_weights(products, (place.step - used[0].place.step) / gap, tolerance)
        if weights is None:
            return Taylor(1, kappa=self.kappa).predict(kept[:2], place)
        newest = used[0].value
        result = widened(newest).clone()
        for item, weight in zip(reversed(used), weights, strict=True):
            result.add_(item.value, alpha=weight)
        return clip(result.to(newest.dtype), kept, self.kappa)

    def lowered(self) -> Predictor:
        """A shorter window; a line below the shortest."""
        if self.window > _FEWEST:
            return DMD(self.window - 1, self.rank_tolerance, self.kappa)
        return Taylor(1, kappa=self.kappa)


def dmd_weights(products: Tensor, power: float, tolerance: float) -> list[float] | None:
    """What each value adds to the newest one.

    Args:
        products: scalar products ``[n, n]`` of the values, oldest first, in float64 on the CPU.
        power: distance to the skipped step in gaps.
        tolerance: singular values below this share of the largest are left out.

    Returns:
        one weight for each value, oldest first; None if the fit has no finite answer.
    """
    if not torch.isfinite(products).all():
        return None
    squares, vectors = torch.linalg.eigh(products[:-1, :-1])
    kept = squares > tolerance**2 * squares[-1].clamp_min(0)
    if not kept.any():  # all values are 0
        return [0.0] * len(products)
    basis = vectors[:, kept] / squares[kept].sqrt()  # X times it is U
    step = basis.T @ products[:-1, 1:] @ basis
    start = basis.T @ products[:-1, -1]
    powered = _matrix_power(step, power)
    if powered is None:
        return None
    weights = basis @ (powered @ start - start)
    return [*weights.tolist(), 0.0] if torch.isfinite(weights).all() else None


def _matrix_power(matrix: Tensor, power: float) -> Tensor | None:
    """Also for powers between whole numbers, by eigenvalues; the real part, where one is negative."""
    if power == int(power):
        return torch.linalg.matrix_power(matrix, int(power))
    values, vectors = torch.linalg.eig(matrix)
    try:
        return torch.linalg.solve(vectors, vectors * values.pow(power), left=False).real
    except RuntimeError:  # the eigenvectors span too little
        return None


def _products(values: Sequence[Tensor]) -> Tensor:
    """All scalar products of some values, in double precision where the device has it; waits for the device."""
    wide = torch.float32 if values[0].device.type == "mps" else torch.float64
    flat = [value.reshape(-1) for value in values]
    total = torch.zeros(len(flat), len(flat), dtype=wide, device=flat[0].device)
    for start in range(0, flat[0].numel(), _CHUNK):
        part = torch.stack([value[start : start + _CHUNK] for value in flat]).to(wide)
        total += part @ part.T
    return total.to("cpu", torch.float64)


def _evenly_spaced(kept: Sequence[Kept]) -> list[Kept]:
    """The longest row of latest values with equal gaps in steps."""
    used = list(kept[:2])
    for item in kept[2:]:
        if used[-1].place.step - item.place.step != used[0].place.step - used[1].place.step:
            break
        used.append(item)
    return used if len(used) > 1 and used[0].place.step != used[1].place.step else used[:1]
