"""How many blocks go into the background: a part of all, or as many as a speed-up takes."""

from __future__ import annotations

from dataclasses import dataclass

from .cost import blocks_for, blocks_of_budget
from .schedule import Schedule, computed_steps, schedule_of


@dataclass(frozen=True)
class Budget:
    """Give either a part or a speed-up.

    Attributes:
        part: of all blocks, in (0, 1).
        speedup: predicted by counting blocks (:func:`.cost.cost`); what is measured is less.
        schedule: for ``speedup``, at which steps the background is computed; see
            :func:`.schedule.schedule_of`.

    Raises:
        ValueError: for both or none of them.
    """

    part: float | None = None
    speedup: float | None = None
    schedule: Schedule = "uniform"

    def __post_init__(self) -> None:
        if (self.part is None) == (self.speedup is None):
            raise ValueError("a budget is either a part of the blocks, in (0, 1), or a predicted speed-up above 1")

    @classmethod
    def of(cls, budget: float | Budget) -> Budget:
        """A plain number is a part."""
        return budget if isinstance(budget, Budget) else cls(part=budget)

    def count(self, layers: int, steps: int | None) -> int:
        """Number of blocks.

        Args:
            layers: blocks of the model.
            steps: sampling steps; needed for a speed-up.

        Raises:
            ValueError: if the budget is out of range, naming the range.
        """
        if self.part is not None:
            return blocks_of_budget(self.part, layers)
        assert self.speedup is not None
        if steps is None:
            raise ValueError("a predicted speed-up depends on the number of steps; give steps, or a part as budget")
        computed = computed_steps(schedule_of(self.schedule), steps)
        return blocks_for(self.speedup, layers, steps, len(computed))
