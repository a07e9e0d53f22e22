"""Decisions as rows: one for each expert, branch and group of units that went the same way, a cell for each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ..record import FORCED, Decision, Place

WHOLE = "all units"
"""How a row is called whose units were not declared."""


@dataclass(frozen=True)
class Cell:
    """One step of a row.

    Attributes:
        step: index of the sampling step.
        computed: whether it was computed; else reused.
        reason: as in :class:`dit_accel.caching.record.Decision`; where the first branch decided, its reason.
        value: the number that the policy decided by, if any; of several units their mean.
        threshold: what it was compared with, if anything; likewise.
        density: kept share of (query, key) pairs of sparse attention in the call; None if attention was not called, or
            is not sparse at any step.
    """

    step: int
    computed: bool
    reason: str
    value: float | None = None
    threshold: float | None = None
    density: float | None = None

    @property
    def is_forced(self) -> bool:
        """Whether it was computed whatever the policy would have said."""
        return self.computed and self.reason in FORCED


@dataclass(frozen=True)
class Row:
    """Units that went the same way in one branch of one expert.

    Attributes:
        expert: attribute name of the root in its pipeline.
        branch: branch of guidance.
        units: their keys; ``("all units",)`` if nobody said which units there are.
        cells: in the order of steps.
    """

    expert: str
    branch: str
    units: tuple[str, ...]
    cells: tuple[Cell, ...]

    @property
    def label(self) -> str:
        """The units in short."""
        if len(self.units) <= 2:
            return ", ".join(self.units)
        kinds = {unit.rpartition(".")[2] for unit in self.units}
        return f"{len(self.units)} x {kinds.pop()}" if len(kinds) == 1 else f"{len(self.units)} units"

    @property
    def computed(self) -> list[int]:
        """Steps at which they were computed."""
        return [cell.step for cell in self.cells if cell.computed]

    @property
    def reused(self) -> list[int]:
        """Steps at which they were reused."""
        return [cell.step for cell in self.cells if not cell.computed]


Call = dict[str | None, Decision]
"""The decisions about one call, by unit; None for the call as a whole."""


def calls_of(decisions: Iterable[Decision]) -> dict[Place, Call]:
    """Decisions call by call; of several about the same unit and step the last."""
    calls: dict[Place, Call] = {}
    for decision in decisions:
        calls.setdefault(decision.place, {})[decision.unit] = decision
    return calls


def rows_of(
    calls: Mapping[Place, Call],
    units: Mapping[str, Iterable[str]],
    densities: Mapping[Place, float] | None = None,
) -> list[Row]:
    """Puts calls together by expert, branch and what became of the units.

    Args:
        calls: of :func:`calls_of`.
        units: keys of the units of each expert, where they were declared.
        densities: of sparse attention, by call; None if there is none.

    Returns:
        rows in the order in which experts, branches and units came up.
    """
    branches: dict[tuple[str, str], dict[int, Call]] = {}
    first: dict[tuple[str, int], Call] = {}  # branch of each step, which may have decided for the others
    for (expert, branch, step), call in calls.items():
        branches.setdefault((expert, branch), {})[step] = call
        first.setdefault((expert, step), call)
    rows: list[Row] = []
    for (expert, branch), by_step in branches.items():
        groups: dict[tuple[tuple[int, bool, str], ...], dict[str, list[Cell]]] = {}
        for unit in _units(units.get(expert, ()), by_step.values()):
            cells = [
                _cell(call, unit, first[expert, step], (densities or {}).get((expert, branch, step)))
                for step, call in sorted(by_step.items())
                if unit in call or None in call
            ]
            way = tuple((cell.step, cell.computed, cell.reason) for cell in cells)
            groups.setdefault(way, {})[unit] = cells
        rows += [Row(expert, branch, tuple(group), _merged(list(group.values()))) for group in groups.values()]
    return rows


def decision_for(call: Call, unit: str) -> Decision:
    """What was decided about a unit: by itself, or with the whole call."""
    return call[unit] if unit in call else call[None]


def _units(declared: Iterable[str], calls: Iterable[Call]) -> list[str]:
    found = dict.fromkeys(declared)
    for call in calls:
        found |= dict.fromkeys(unit for unit in call if unit is not None)
    return list(found) or [WHOLE]


def _merged(units: Sequence[Sequence[Cell]]) -> tuple[Cell, ...]:
    """The cells of several units that went the same way, with the means of their values and thresholds."""
    return tuple(
        replace(cells[0], value=_mean([cell.value for cell in cells]), threshold=_mean([c.threshold for c in cells]))
        for cells in zip(*units, strict=True)
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _cell(call: Call, unit: str, first: Call, density: float | None) -> Cell:
    decision = decision_for(call, unit)
    reason = decision.reason
    if reason == "shared" and (unit in first or None in first):
        reason = decision_for(first, unit).reason
    return Cell(decision.step, decision.computed, reason, decision.value, decision.threshold, density)
