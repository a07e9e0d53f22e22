"""Scopes made of consecutive transformer blocks, whose residual stands in for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..unit import Unit
from .base import RootView, Scope


@dataclass(frozen=True)
class Range(Scope):
    """Blocks ``start`` to ``stop``, which is not included, as one unit.

    Attributes:
        start: index of the first block.
        stop: index behind the last; None for all blocks to the end, negative to count from there.
    """

    start: int = 0
    stop: int | None = None

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`."""
        _check_blocks(view)
        count = len(view.blocks)
        stop = count if self.stop is None else self.stop if self.stop > 0 else count + self.stop
        if not 0 <= self.start < stop <= count:
            raise ValueError(
                f"blocks {self.start} to {self.stop} are no range of {view.name}, which has {count} blocks; give "
                f"0 <= start < stop <= {count}"
            )
        return (_unit(self.start, stop - 1),)


class Whole(Range):
    """All blocks as one unit (TeaCache, MagCache)."""

    def __init__(self) -> None:
        super().__init__(0, None)

    def __repr__(self) -> str:
        return "Whole()"


@dataclass(frozen=True)
class Tail(Scope):
    """All blocks but the first ``front`` and the last ``back``, as one unit (FBCache, DBCache).

    Attributes:
        front: blocks that always run, whose change a probe measures.
        back: last blocks that always run, which refine what was predicted.
    """

    front: int = 1
    back: int = 0

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`."""
        _check_blocks(view)
        count = len(view.blocks)
        if self.front < 0 or self.back < 0 or self.front + self.back >= count:
            raise ValueError(
                f"front={self.front} and back={self.back} leave no block of {view.name} to skip, which has {count}; "
                f"give numbers from 0 whose sum is at most {count - 1}"
            )
        return (_unit(self.front, count - self.back - 1),)


@dataclass(frozen=True)
class Runs(Scope):
    """Listed blocks; each maximal run of consecutive ones is a unit (ProfilingDiT, arXiv 2504.03140).

    Attributes:
        blocks: indices of the blocks that may be skipped.
    """

    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(sorted(set(self.blocks))))

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`."""
        _check_blocks(view)
        count = len(view.blocks)
        if not self.blocks or self.blocks[0] < 0 or self.blocks[-1] >= count:
            raise ValueError(
                f"blocks {list(self.blocks)} are not all in {view.name}; list one or more from 0 to {count - 1}"
            )
        return tuple(_unit(first, last) for first, last in runs_of(self.blocks))


@dataclass(frozen=True)
class EachBlock(Scope):
    """Every block is a unit of its own, but for the first ``front`` and the last ``back`` (block-wise pruning).

    Attributes:
        front: first blocks that always run.
        back: last blocks that always run.
    """

    front: int = 0
    back: int = 0

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`."""
        (whole,) = Tail(self.front, self.back).units(view)
        return tuple(_unit(index, index) for index in range(whole.first, whole.last + 1))


def runs_of(indices: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every maximal run of consecutive numbers among rising ones."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _unit(first: int, last: int) -> Unit:
    return Unit(f"blocks {first}-{last}" if last > first else f"block {first}", "blocks", first, last)


def _check_blocks(view: RootView) -> None:
    if view.is_unet:
        raise ValueError(
            f"the blocks of {view.name} change the shape of what they are given, so they cannot be skipped by their "
            "residual; use the scopes Deep, Output, Attention or a preset for UNets (deepcache, tgate)"
        )
    if not view.blocks:
        raise ValueError(
            f"dit_accel does not know the blocks of {view.name}, or what they return; register block_lists and "
            "block_streams in its Family (see CONTRIBUTING.md)"
        )
