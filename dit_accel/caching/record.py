"""What a cache decided, call by call: written by the engine, read by the report."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .unit import Unit

if TYPE_CHECKING:
    from ..clock import StepState

FORCED = frozenset(
    {
        "warm-up",
        "cool-down",
        "max_consecutive",
        "max_total",
        "first",
        "shape",
        "prompt",
        "jump",
        "inactive",
        "branch",
        "incomplete",
        "not asked",
    }
)
"""Reasons that compute whatever the policy would say."""
MOST_DECISIONS = 200_000  # of one generation; only loops that never end one come near

Place = tuple[str, str, int]
"""Expert, branch and step: one call of the model, or all its calls if the sampler repeats a step."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether one call, or one unit in it, was computed, and why.

    Attributes:
        generation: as the clock counts them.
        step: index of the sampling step, from 0.
        branch: branch of guidance.
        expert: attribute name of the root in its pipeline.
        cache: name of the cache.
        unit: key of the unit; None for the whole call, that is for all units that have no decision of their own.
        computed: whether it was computed; else it was predicted.
        reason: ``"policy"``, ``"shared"`` (as the first branch of the step), ``"audit"``, or one of :data:`FORCED`.
        value: the number that the policy decided by, None if it has none or was not asked.
        threshold: what the policy compared it with, None if it has none.
    """

    generation: int
    step: int
    branch: str
    expert: str
    cache: str
    unit: str | None
    computed: bool
    reason: str
    value: float | None = None
    threshold: float | None = None

    @property
    def place(self) -> Place:
        """Which call of its generation it is about."""
        return self.expert, self.branch, self.step


@dataclass(frozen=True, slots=True)
class AuditResult:
    """One check of reuse while it happened.

    Attributes:
        generation: as the clock counts them.
        step: index of the sampling step.
        branch: branch of guidance.
        expert: attribute name of the root in its pipeline.
        error: relative error ``mean|predicted - computed| / mean|computed|``.
        tightened: whether the policy was tightened because of it.
    """

    generation: int
    step: int
    branch: str
    expert: str
    error: float
    tightened: bool


@dataclass
class CacheRecord:
    """The decisions of one cache: all of the latest generation, and counts over all generations.

    Attributes:
        name: of the cache; its preset, where it has one.
        recipe: the cache as text.
        units: by expert, the units and the share of the model's blocks that each stands for, see :func:`share_of`.
        decisions: of the latest generation, in order; the oldest are dropped beyond 200,000.
        audits: of the latest generation.
        downgrades: what was kept in a cheaper way than the recipe says, and why, in order.
        bytes_now: what is kept at present.
        bytes_most: the most that was kept at any time.
        estimate: what the engine expected to keep, in words; ``""`` if it could not tell.
        generations: how many generations decisions came from.
        computed: calls and units computed, over all generations, by reason.
        reused: likewise, those that were reused.
    """

    name: str = ""
    recipe: str = ""
    units: dict[str, dict[str, float | None]] = field(default_factory=dict)
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=MOST_DECISIONS))
    audits: list[AuditResult] = field(default_factory=list)
    downgrades: list[str] = field(default_factory=list)
    bytes_now: int = 0
    bytes_most: int = 0
    estimate: str = ""
    generations: int = 0
    computed: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    _generation: int | None = None

    def declare(self, expert: str, units: Mapping[str, float | None]) -> None:
        """Says which units an expert has, so that decisions about whole calls count for each of them.

        Args:
            expert: attribute name of the root in its pipeline.
            units: key of each unit, and :func:`share_of` it.
        """
        self.units[expert] = dict(units)

    def begin(self, generation: int) -> None:
        """Drops what is of an earlier generation; the new one counts from its first decision, and may have none.

        Args:
            generation: as the clock counts them.
        """
        if generation != self._generation:
            self.decisions.clear()
            self.audits.clear()

    def append(self, decision: Decision) -> None:
        """Takes note of a decision; the first one of a generation drops those of the generation before."""
        self._enter(decision.generation)
        self.decisions.append(decision)
        (self.computed if decision.computed else self.reused)[decision.reason] += 1

    def add_audit(self, state: StepState, error: float, tightened: bool) -> None:
        """Takes note of a check of reuse.

        Args:
            state: of the call that was computed to be compared.
            error: relative error of what would have been used.
            tightened: whether the policy was tightened because of it.
        """
        self._enter(state.generation)
        self.audits.append(AuditResult(state.generation, state.step, state.branch, state.expert, error, tightened))

    def downgrade(self, text: str) -> None:
        """Takes note of a cheaper way to keep values, in words."""
        self.downgrades.append(text)

    def keep(self, count: int) -> None:
        """Takes note of how many bytes are kept now."""
        self.bytes_now = count
        self.bytes_most = max(self.bytes_most, count)

    def reset(self) -> None:
        """Forgets everything but what describes the cache: its name, recipe, units, estimate and bytes of now."""
        self.decisions.clear()
        self.audits.clear()
        self.downgrades.clear()
        self.computed.clear()
        self.reused.clear()
        self.bytes_most = self.bytes_now
        self.generations, self._generation = 0, None

    def _enter(self, generation: int) -> None:
        self.begin(generation)
        if generation != self._generation:
            self._generation = generation
            self.generations += 1


def share_of(unit: Unit, blocks: int) -> float | None:
    """The share of a model's blocks that is skipped when a unit is; None where blocks do not tell.

    Args:
        unit: what would be skipped.
        blocks: how many blocks the model has.

    Returns:
        a number in (0, 1]; None for single modules and for the inner part of a UNet, whose cost blocks do not tell.

    Raises:
        ValueError: if the range of the unit is not within the blocks.
    """
    if unit.kind == "output":
        return 1.0
    if unit.kind != "blocks":
        return None
    if not 0 <= unit.first <= unit.last < blocks:
        raise ValueError(f"{unit.key} has blocks {unit.first} to {unit.last}; the model has 0 to {blocks - 1}")
    return (unit.last - unit.first + 1) / blocks
