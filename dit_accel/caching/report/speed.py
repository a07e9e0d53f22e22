"""How much faster: predicted from what was skipped, and measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from ...timing import CallTime, TimeReport
from ..record import Place


@dataclass(frozen=True)
class Speed:
    """Times and ratios of the latest generation; None where nothing tells them.

    Times are there if they were taken (``accelerate(..., timed=True)``).

    Attributes:
        computed_fraction: share of the model's blocks that was computed, over all calls, blocks counted alike; None
            for units whose part of the model blocks do not tell.
        attention_share: part of a dense, fully computed call that attention takes, measured in this run.
        sparse_cost: time of attention in computed calls over that in dense ones, measured in this run; 1 without
            sparse attention.
        predicted: how many times faster than computing everything densely: ``1 / (f * (1 - a + a * rho))``.
        measured: the same from times: a median dense, fully computed call, times calls, over the time that they took.
        seconds_computed: median of fully computed calls.
        seconds_reused: median of calls in which something was reused.
        overhead: time of the cache itself over all other time of the calls.
        calls: of the model that the cache decided on.
    """

    computed_fraction: float | None = None
    attention_share: float | None = None
    sparse_cost: float | None = None
    predicted: float | None = None
    measured: float | None = None
    seconds_computed: float | None = None
    seconds_reused: float | None = None
    overhead: float | None = None
    calls: int = 0


def predicted_speedup(computed: float, attention: float = 1.0, sparse_cost: float = 1.0) -> float:
    """``1 / (f * (1 - a + a * rho))``: caching and sparse attention multiply.

    It leaves out what a reused call still runs (embeddings, probe blocks) and what the cache itself takes.

    Args:
        computed: f, the share of the work that is computed, in [0, 1].
        attention: a, the part of it that is attention, in [0, 1].
        sparse_cost: rho, time of sparse attention over that of dense attention.

    Returns:
        how many times faster; infinite if nothing is computed.

    Raises:
        ValueError: for numbers outside these ranges.
    """
    if not (0 <= computed <= 1 and 0 <= attention <= 1 and sparse_cost >= 0):
        raise ValueError(
            "computed and attention lie in [0, 1], and sparse_cost is at least 0; got "
            f"{computed}, {attention} and {sparse_cost}"
        )
    cost = computed * (1 - attention + attention * sparse_cost)
    return 1 / cost if cost > 0 else math.inf


def combined_fraction(parts: Sequence[tuple[float | None, int]]) -> float | None:
    """The share computed under several caches that skip different units; None if one of them is not known.

    Args:
        parts: the share computed under each cache, and the number of calls it is over: fewer for a cache that was not
            asked where another one had skipped the call.
    """
    skipped = 0.0
    for fraction, calls in parts:
        if fraction is None:
            return None
        skipped += (1 - fraction) * calls
    most = max((calls for _, calls in parts), default=0)
    return max(0.0, 1 - skipped / most) if most else None


def combined_speedup(speeds: Sequence[Speed]) -> float | None:
    """Predicted of several caches that skip different units, from what each of them knows; None if one does not.

    Attention's share and cost are those of the same run, so any of them tells these.
    """
    fraction = combined_fraction([(speed.computed_fraction, speed.calls) for speed in speeds])
    costs = [(speed.attention_share, speed.sparse_cost) for speed in speeds]
    share, cost = next(((a, rho) for a, rho in costs if a is not None), costs[0] if costs else (None, None))
    if fraction is None or cost is None or (share is None and cost != 1.0):
        return None
    return predicted_speedup(fraction, share or 0.0, cost)


def speed_of(
    fraction: float | None,
    is_computed: Mapping[Place, bool],
    times: TimeReport | None,
    densities: Mapping[Place, float] | None,
    skipped: Collection[Place] = (),
) -> Speed:
    """Puts together what is known.

    Args:
        fraction: share of the work that was computed.
        is_computed: for every call, whether nothing in it was reused.
        times: of the calls, if taken.
        densities: of sparse attention, by call; None if there is none.
        skipped: calls in which any cache of the same model reused something.
    """
    share: float | None = None
    cost: float | None = 1.0 if densities is None else None
    measured = seconds_computed = seconds_reused = overhead = None
    if times is not None and times.calls:
        full = [call for call in times.calls if _place(call) not in skipped]
        computed = [call for call in full if is_computed.get(_place(call), True)]
        reused = [call for call in times.calls if not is_computed.get(_place(call), True)]
        dense = [call for call in computed if densities is None or densities.get(_place(call)) == 1.0]
        seconds_computed, seconds_reused = _median(computed), _median(reused)
        overhead = _ratio(times.cache, times.total - times.cache)
        if dense:
            measured = _ratio(median(call.total - call.cache for call in dense) * len(times.calls), times.total)
        if dense and times.attention_seen:
            share = _ratio(fmean(call.attention for call in dense), fmean(call.total - call.cache for call in dense))
            if densities is not None:
                cost = _ratio(fmean(call.attention for call in computed), fmean(call.attention for call in dense))
    predicted = None
    if fraction is not None and cost is not None and (share is not None or cost == 1.0):
        predicted = predicted_speedup(fraction, share or 0.0, cost)
    calls = len(is_computed)
    return Speed(fraction, share, cost, predicted, measured, seconds_computed, seconds_reused, overhead, calls)


def _place(call: CallTime) -> Place:
    return call.expert, call.branch, call.step


def _median(calls: Sequence[CallTime]) -> float | None:
    return median(call.total for call in calls) if calls else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
