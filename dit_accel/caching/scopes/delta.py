"""Rear blocks are skipped early in a generation, front blocks late: Delta-DiT."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..unit import Unit
from .base import RootView, Scope
from .blocks import Range


@dataclass(frozen=True)
class DeltaUnit(Unit):
    """Blocks with the part of the generation in which they may be skipped.

    Attributes:
        early: whether that is before the switch.
        late: whether that is from the switch on.
    """

    early: bool = False
    late: bool = False


@dataclass(frozen=True)
class Delta(Scope):
    """The last ``rear`` blocks before a certain step, the first ``front`` blocks from it on (arXiv 2406.01125).

    Front blocks make outlines, which are settled early, and rear blocks details, which are settled late; each stage
    skips the blocks that matter less to it. Where both ranges overlap, the shared blocks are a unit of their own,
    which is skipped in both stages.

    Attributes:
        front: blocks to skip late: how many, or a part of all as a float in [0, 1].
        rear: blocks to skip early; likewise.
        switch: first step of the late stage: its index, or a part of all steps as a float in [0, 1], rounded.

    Raises:
        ValueError: numbers outside these ranges, or neither front nor rear blocks; in a model with fewer blocks; a
            fraction of steps where nobody says how many there are.
    """

    front: int | float = 0.75
    rear: int | float = 0.75
    switch: int | float = 0.5

    def __post_init__(self) -> None:
        for name, what in (("front", "blocks"), ("rear", "blocks"), ("switch", "steps")):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not (0 <= value <= 1 if isinstance(value, float) else value >= 0):
                raise ValueError(f"{name} is a number of {what} from 0, or a part of all in [0.0, 1.0]; got {value!r}")
        if not self.front and not self.rear:
            raise ValueError("front and rear are both 0, so no block would be skipped; give one of them a number")

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`."""
        (whole,) = Range(0, None).units(view)
        count = whole.last + 1
        front, rear = (_count(blocks, count) for blocks in (self.front, self.rear))
        if max(front, rear) > count or not front + rear:
            raise ValueError(
                f"front={self.front} and rear={self.rear} are {front} and {rear} blocks of {view.name}, which has "
                f"{count}; give numbers up to {count}, not both 0"
            )
        edges = sorted({0, front, count - rear, count})
        parts = [
            DeltaUnit(
                f"blocks {first}-{stop - 1}" if stop > first + 1 else f"block {first}",
                "blocks",
                first=first,
                last=stop - 1,
                early=first >= count - rear,
                late=stop <= front,
            )
            for first, stop in pairwise(edges)
        ]
        return tuple(part for part in parts if part.early or part.late)

    def is_active(self, unit: Unit, step: int, steps: int | None) -> bool:
        """See :meth:`Scope.is_active`."""
        assert isinstance(unit, DeltaUnit)
        return unit.early if step < self._switch_step(steps) else unit.late

    def _switch_step(self, steps: int | None) -> int:
        if not isinstance(self.switch, float):
            return self.switch
        if steps is None:
            raise ValueError(
                f"switch={self.switch} is a part of all steps, and nobody says how many there are; give an int, or "
                "call clock.set_step(step, steps) before each call of the model"
            )
        return round(self.switch * steps)


def _count(blocks: int | float, count: int) -> int:
    return round(blocks * count) if isinstance(blocks, float) else blocks
