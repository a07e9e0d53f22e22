"""Finds the blocks whose skipping does least harm, by trying: the best single ones, then random swaps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

Blocks = tuple[int, ...]
Tell = Callable[[str], None]


def silent(message: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        blocks: the best set seen, ascending.
        error: its error.
        singles: error of skipping each block alone.
        start: error of the blocks with the smallest single errors, where the swaps began.
        trials: swaps tried; those of a set that was tried before count, and are not run again.
        accepted: swaps that lowered the error.
        evaluations: how often the error was measured.
    """

    blocks: Blocks
    error: float
    singles: tuple[float, ...]
    start: float
    trials: int
    accepted: int
    evaluations: int


def find_subset(
    error: Callable[[Blocks], float], layers: int, size: int, *, trials: int = 50, seed: int = 0, tell: Tell = silent
) -> Found:
    """Searches a set of blocks with a small error; the same arguments give the same set.

    First every block is skipped alone. The ``size`` blocks with the smallest errors are the first set (greedy); then
    swaps of one block inside for one outside are drawn, and kept if they lower the error.

    Args:
        error: measures what skipping a set of blocks does; called once for each set.
        layers: blocks of the model.
        size: blocks in the set.
        trials: swaps that are drawn.
        seed: of the draws.
        tell: called with a line of progress now and then.

    Raises:
        ValueError: for numbers out of range, or if an error is not a number for every single block.
    """
    if not 1 <= size <= layers:
        raise ValueError(f"of {layers} blocks 1 to {layers} can be skipped; got {size}")
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 0:
        raise ValueError(f"trials is a number of swaps from 0; got {trials!r}")
    known = _Known(error)
    singles = []
    for block in range(layers):
        singles.append(known((block,)))
        tell(f"[{block + 1}/{layers}] block {block} alone: error {singles[-1]:.4g}")
    if not any(map(math.isfinite, singles)):
        raise ValueError("skipping any block gives numbers that are not finite; the model or its settings are broken")
    best = tuple(sorted(sorted(range(layers), key=lambda block: (singles[block], block))[:size]))
    start = lowest = known(best)
    tell(f"the best {size} alone, together: error {start:.4g}")
    draw, accepted, outside = random.Random(seed), 0, layers - size
    for trial in range(trials if outside else 0):
        candidate = _swapped(best, layers, draw)
        found = known(candidate)
        if found < lowest:
            best, lowest, accepted = candidate, found, accepted + 1
            tell(f"swap {trial + 1}/{trials}: error {lowest:.4g}")
    return Found(best, lowest, tuple(singles), start, trials if outside else 0, accepted, len(known.errors))


class _Known:
    """Measures each set once. Errors that are not finite count as infinite, so that they never win."""

    def __init__(self, error: Callable[[Blocks], float]) -> None:
        self._error = error
        self.errors: dict[Blocks, float] = {}

    def __call__(self, blocks: Blocks) -> float:
        if blocks not in self.errors:
            found = float(self._error(blocks))
            self.errors[blocks] = found if math.isfinite(found) else math.inf
        return self.errors[blocks]


def _swapped(blocks: Blocks, layers: int, draw: random.Random) -> Blocks:
    out = draw.choice(blocks)
    rest = [block for block in range(layers) if block not in blocks]
    return tuple(sorted({*blocks, draw.choice(rest)} - {out}))
