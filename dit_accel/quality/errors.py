"""Errors of predicted outputs, from traces alone: what a step would be off by, had it been skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..caching.engine.keeper import latents_like
from ..caching.predictors.base import Kept, Place, Predictor
from ..caching.predictors.reuse import Reuse
from ..caching.predictors.settled import Settled
from ..caching.predictors.taylor import Taylor
from .search import History
from .trace import Trace, TracedCall

_CHUNK = 1 << 20  # elements of each value that are multiplied at once


def value_of(call: TracedCall, residual: bool) -> Tensor:
    """What the scope ``Output`` keeps of a call, float32: its output, less the latents if ``residual``."""
    base = latents_like(call.output, call.latents) if residual else None
    return call.output.float() if base is None else call.output.float() - base.float()


def output_of(value: Tensor, call: TracedCall, residual: bool) -> Tensor:
    """The output of a call whose value is predicted."""
    base = latents_like(call.output, call.latents) if residual else None
    return value if base is None else value + base.float()


def is_linear(predictor: Predictor) -> bool:
    """Whether predictions are sums of kept values with weights that depend on the places alone.

    Lines are, even bounded: all tokens then change by the same multiple of the change before.
    """
    if type(predictor) is Settled:
        return is_linear(predictor.predictor)
    return type(predictor) is Reuse or (
        type(predictor) is Taylor and (predictor.order == 1 or predictor.kappa is None)
    )


def coefficients(predictor: Predictor, places: Sequence[Place], place: Place) -> Tensor:
    """The weights of a linear predictor, float64 ``[len(places)]``, read off its prediction of unit vectors.

    Args:
        predictor: for which :func:`is_linear` holds.
        places: of the computed values, newest first.
        place: of the skipped step.
    """
    units = torch.eye(len(places), dtype=torch.float64)
    return predictor.predict([Kept(at, unit) for at, unit in zip(places, units, strict=True)], place).double()


def products(values: Sequence[Tensor]) -> Tensor:
    """Mean products of all pairs of values: float64 ``[steps, steps]``."""
    flat = [value.flatten() for value in values]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat[0].numel(), _CHUNK):
        rows = torch.stack([value[start : start + _CHUNK] for value in flat]).double()
        total += rows @ rows.T
    return total / flat[0].numel()


class StepErrors:
    """Errors of one predictor at output scope along one trace, teacher-forced: all that was kept is exact.

    Call it with a history and a step: the root mean square error of the output over its branches, times how far the
    sampler goes at that step, which is what first-order samplers add to the latents. Errors of linear predictors come
    from the products of values, which are taken once; those of others from the tensors themselves, see :meth:`plain`.

    Args:
        trace: of a dense run.
        predictor: what stands in for the output.
        residual: as of the scope ``Output``.
    """

    def __init__(self, trace: Trace, predictor: Predictor, residual: bool) -> None:
        self._trace, self.predictor, self._residual = trace, predictor, residual
        self._calls = _by_branch(trace)
        self._places = {call.step: call.place(trace.steps) for call in trace.calls}
        self._products: dict[tuple[str, str], Tensor] = {}
        if is_linear(predictor):
            self._products = {
                branch: products([value_of(call, residual) for call in calls.values()])
                for branch, calls in self._calls.items()
            }
        self._known: dict[tuple[History, int], float] = {}

    def __call__(self, history: History, step: int) -> float:
        """The error of a step, predicted from computed ones.

        Args:
            history: the latest computed steps, newest first; beyond the predictor's depth they do not matter.
            step: that is skipped.
        """
        history = history[: self.predictor.depth]
        found = self._known.get((history, step))
        if found is None:
            found = self._known[history, step] = (
                self._quick(history, step) if self._products else self.plain(history, step)
            )
        return found

    def plain(self, history: History, step: int) -> float:
        """The same by predicting every tensor: the definition."""
        squares = []
        for calls in self._here(history, step).values():
            kept = [Kept(self._places[at], value_of(calls[at], self._residual)) for at in history]
            predicted = self.predictor.predict(kept, self._places[step])
            squares.append(float((predicted - value_of(calls[step], self._residual)).double().square().mean()))
        return self._mean(step, squares)

    def _quick(self, history: History, step: int) -> float:
        weights = coefficients(self.predictor, [self._places[at] for at in history], self._places[step])
        signed = torch.cat([weights, -torch.ones(1, dtype=torch.float64)])
        squares = []
        for branch, calls in self._here(history, step).items():
            order = list(calls)
            at = torch.tensor([order.index(s) for s in (*history, step)])
            squares.append(max(float(signed @ self._products[branch][at][:, at] @ signed), 0.0))
        return self._mean(step, squares)

    def _here(self, history: History, step: int) -> dict[tuple[str, str], dict[int, TracedCall]]:
        """The branches that are predicted: one that had no call at a computed step is computed itself."""
        return {branch: calls for branch, calls in self._calls.items() if calls.keys() >= {*history, step}}

    def _mean(self, step: int, squares: list[float]) -> float:
        return self._trace.strides[step] * math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _by_branch(trace: Trace) -> dict[tuple[str, str], dict[int, TracedCall]]:
    """Calls by expert and branch, and by step."""
    found: dict[tuple[str, str], dict[int, TracedCall]] = {}
    for call in trace.calls:
        found.setdefault((call.expert, call.branch), {})[call.step] = call
    return found
