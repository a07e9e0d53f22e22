"""The report of one cache: steps, reasons, memory and speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...timing import TimeReport
from ..record import AuditResult, CacheRecord, Place
from .rows import WHOLE, Call, Row, calls_of, decision_for, rows_of
from .speed import Speed, speed_of


@dataclass
class CacheReport:
    """What one cache did in the latest generation.

    Attributes:
        name: of the cache; its preset, where it has one.
        recipe: the cache as text.
        rows: which steps were computed and reused, and why, by expert, branch and units that went the same way.
        unit_counts: by expert and unit, how often it was computed and how often reused.
        reasons: why units were computed (``"computed: warm-up"``) and reused (``"reused: policy"``): counts.
        totals: calls and units decided on over all generations, ``computed`` and ``reused``.
        generations: how many those were.
        audits: checks of reuse.
        bytes_now: what is kept.
        bytes_most: the most that was kept.
        estimate: what was expected to be kept, in words.
        downgrades: what was kept in a cheaper way, and why.
        speed: predicted and measured.
    """

    name: str
    recipe: str = ""
    rows: list[Row] = field(default_factory=list)
    unit_counts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    generations: int = 0
    audits: list[AuditResult] = field(default_factory=list)
    bytes_now: int = 0
    bytes_most: int = 0
    estimate: str = ""
    downgrades: list[str] = field(default_factory=list)
    speed: Speed = field(default_factory=Speed)

    @property
    def computed_steps(self) -> dict[str, dict[str, list[int]]]:
        """By expert and branch: steps at which nothing was reused."""
        return self._steps(reused=False)

    @property
    def reused_steps(self) -> dict[str, dict[str, list[int]]]:
        """By expert and branch: steps at which something was reused."""
        return self._steps(reused=True)

    @property
    def gained(self) -> bool:
        """Whether anything was reused."""
        return any(row.reused for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        steps = {"computed_steps": self.computed_steps, "reused_steps": self.reused_steps}
        return asdict(self) | steps | {"gained": self.gained}

    def lines(self) -> list[str]:
        """A few lines for people."""
        lines = [f"cache: {self.name or 'unnamed'}"]
        for expert, branches in self.computed_steps.items():
            for branch, computed in branches.items():
                reused = self.reused_steps[expert][branch]
                counts = f"of {len(computed) + len(reused)} steps {len(computed)} computed, {len(reused)} reused"
                lines.append(f"  {expert}, {branch}: {counts}")
        if self.reasons:
            lines.append("  why: " + ", ".join(f"{reason} {count}" for reason, count in self.reasons.items()))
        if self.bytes_most:
            lines.append(f"  kept: {_size(self.bytes_now)} now, {_size(self.bytes_most)} at most")
        lines += [f"  expected to keep: {self.estimate}"] if self.estimate else []
        lines += [f"  DOWNGRADE {text}" for text in self.downgrades]
        if self.audits:
            worst, tightened = max(audit.error for audit in self.audits), sum(a.tightened for a in self.audits)
            lines.append(f"  audits: {len(self.audits)}, largest relative error {worst:.3g}, tightened: {tightened}")
        return [*lines, *self._speed_lines()]

    def summary(self) -> str:
        """The same as one text."""
        return "\n".join(self.lines())

    def _speed_lines(self) -> list[str]:
        speed, lines = self.speed, []
        if speed.seconds_computed is not None and speed.seconds_reused is not None:
            lines.append(f"  a call: {speed.seconds_computed:.4g} s computed, {speed.seconds_reused:.4g} s reused")
        said = [
            f"{words} {ratio:.2f}x"
            for words, ratio in (("predicted", speed.predicted), ("measured", speed.measured))
            if ratio is not None
        ]
        if said:
            lines.append(f"  speed-up of the model: {', '.join(said)}")
        if not self.rows:
            lines.append("  NO GAIN: the model has not been called yet, or had nothing to skip")
        elif not self.gained:
            cost = "not timed (timed=True)" if speed.overhead is None else f"{speed.overhead:.1%}"
            lines.append(f"  NO GAIN: nothing was reused; overhead of the cache {cost}")
        return lines

    def _steps(self, reused: bool) -> dict[str, dict[str, list[int]]]:
        found: dict[str, dict[str, list[int]]] = {}
        branches = dict.fromkeys((row.expert, row.branch) for row in self.rows)
        for expert, branch in branches:
            rows = [row for row in self.rows if (row.expert, row.branch) == (expert, branch)]
            some = {step for row in rows for step in row.reused}
            steps = some if reused else {step for row in rows for step in row.computed} - some
            found.setdefault(expert, {})[branch] = sorted(steps)
        return found


def reused_places(record: CacheRecord) -> set[Place]:
    """The calls of the latest generation in which a cache reused something."""
    return _reused(rows_of(calls_of(record.decisions), record.units))


def cache_report(
    record: CacheRecord,
    times: TimeReport | None = None,
    densities: Mapping[Place, float] | None = None,
    reused: Collection[Place] = (),
) -> CacheReport:
    """Makes the report of a cache.

    Args:
        record: what it decided.
        times: of the calls of the same generation, if they were taken.
        densities: kept share of (query, key) pairs in each call of that generation; None without sparse attention.
        reused: calls in which any cache of the same model reused something, see :func:`reused_places`.
    """
    calls = calls_of(record.decisions)
    rows = rows_of(calls, record.units, densities)
    is_computed = dict.fromkeys(calls, True) | dict.fromkeys(_reused(rows), False)
    totals = {"computed": record.computed.total(), "reused": record.reused.total()}
    return CacheReport(
        name=record.name,
        recipe=record.recipe,
        rows=rows,
        unit_counts=_unit_counts(rows),
        reasons=_reasons(rows),
        totals=totals,
        generations=record.generations,
        audits=list(record.audits),
        bytes_now=record.bytes_now,
        bytes_most=record.bytes_most,
        estimate=record.estimate,
        downgrades=list(record.downgrades),
        speed=speed_of(_fraction(calls, record.units), is_computed, times, densities, reused),
    )


def _reused(rows: list[Row]) -> set[Place]:
    return {(row.expert, row.branch, step) for row in rows for step in row.reused}


def _unit_counts(rows: list[Row]) -> dict[str, dict[str, tuple[int, int]]]:
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for row in rows:
        units = counts.setdefault(row.expert, {})
        for unit in row.units:
            computed, reused = units.get(unit, (0, 0))
            units[unit] = (computed + len(row.computed), reused + len(row.reused))
    return counts


def _reasons(rows: list[Row]) -> dict[str, int]:
    """Counts over units: a call that is decided as a whole counts once for each of them."""
    counts: Counter[str] = Counter()
    for row in rows:
        for cell in row.cells:
            counts[f"{'computed' if cell.computed else 'reused'}: {cell.reason}"] += len(row.units)
    return dict(counts.most_common())


def _fraction(calls: Mapping[Place, Call], units: Mapping[str, Mapping[str, float | None]]) -> float | None:
    """Share of the blocks that was computed, over all calls; None if the share of a unit is not known."""
    skipped = 0.0
    for (expert, _, _), call in calls.items():
        shares = units.get(expert, {WHOLE: None})
        for unit, share in shares.items():
            if (unit in call or None in call) and not decision_for(call, unit).computed:
                if share is None:
                    return None
                skipped += share
    return 1 - skipped / len(calls) if calls else None


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1000:  # so that three digits do
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
