"""The walk up a ladder of caches by real runs: the fastest rung that is good enough, with few runs."""

from __future__ import annotations

from collections.abc import Callable


def last_good(count: int, start: int, good: Callable[[int], bool], first: int = 0) -> int | None:
    """The last of ``first .. count - 1`` that is good, if all before it are and none after it.

    Gallops from a guess in growing steps until one is good and a later one is not, then halves what lies between.
    Where quality is not monotone it ends at a good one whose successor, as far as it was tried, is not.

    Args:
        count: how many there are.
        start: the guess.
        good: tells by measurement; asked at most once for each.
        first: the earliest worth a try.

    Returns:
        None if the first is not good.
    """
    low, high = first - 1, count
    at, stride = min(max(start, first), count - 1), 1
    while high - low > 1:
        if good(at):
            low = at
        else:
            high = at
        if low >= first and high < count:
            at = (low + high) // 2
        else:
            at = min(low + stride, count - 1) if low >= first else max(high - stride, first)
            stride *= 2
    return low if low >= first else None
