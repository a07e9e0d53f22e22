"""Lays the schedule out: a row for each cache, branch and group of units, a column for each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ..report.cache_report import CacheReport
from ..report.rows import WHOLE, Cell, Row
from .shapes import Box, Curve, Drawing, Kind, Words, short

MOST_ROWS = 48
"""Rows drawn of one cache; of more, the first."""
LABELS, MARGIN, ROW, GAP, STRIP = 230.0, 14.0, 18.0, 4.0, 46.0
WIDTH = 720.0  # of all columns, as far as cells stay between LEAST and MOST wide
LEAST, MOST = 5.0, 24.0
PALEST = 0.3  # shade of a computed cell whose attention keeps almost nothing


def schedule(reports: Sequence[CacheReport]) -> Drawing:
    """Lays out what caches did.

    Args:
        reports: one for each cache.

    Raises:
        ValueError: if there are no caches, or the model has not been called.
    """
    if not reports:
        raise ValueError('there is no schedule to draw; give a cache, such as accelerate(pipe, cache="teacache")')
    steps = 1 + max((cell.step for report in reports for row in report.rows for cell in row.cells), default=-1)
    if steps == 0:
        raise ValueError("there is no schedule to draw yet; call the pipeline first")
    column = min(MOST, max(LEAST, WIDTH / steps))
    page = _Page(column, steps)
    for report in reports:
        page.add(report)
    page.add_legend(any(cell.density is not None for report in reports for row in report.rows for cell in row.cells))
    return Drawing(MARGIN * 2 + LABELS + max(column * steps, 430), page.top + MARGIN, _said(reports), page.shapes)


class _Page:
    """Fills itself from top to bottom."""

    def __init__(self, column: float, steps: int) -> None:
        self.column, self.steps = column, steps
        self.top = MARGIN
        self.shapes: list[Box | Words | Curve] = []

    def add(self, report: CacheReport) -> None:
        self._heading(f"cache {report.name}" if report.name else "cache")
        shown = report.rows[:MOST_ROWS]
        several = len({row.expert for row in report.rows}) > 1
        for row in shown:
            self._row(row, several)
        if len(report.rows) > len(shown):
            self._note(f"and {len(report.rows) - len(shown)} more rows, all of them in the JSON report")
        self._steps()

    def add_legend(self, has_densities: bool) -> None:
        kinds: list[tuple[Kind, float, str]] = [
            ("computed", 1.0, "computed, as the policy wanted"),
            ("forced", 1.0, "computed, forced (warm-up, limits, no value)"),
            ("audited", 1.0, "computed to check a prediction"),
            ("reused", 1.0, "reused"),
        ]
        kinds += [("computed", PALEST, "faint: attention was sparse, the fainter the less it kept")] * has_densities
        self.top += 6
        for kind, shade, words in kinds:
            self.shapes.append(Box(MARGIN + LABELS, self.top, 14, 12, kind, shade))
            self.shapes.append(Words(MARGIN + LABELS + 22, self.top + 10, words, "soft"))
            self.top += ROW

    def _heading(self, text: str) -> None:
        self.shapes.append(Words(MARGIN, self.top + 12, text, is_bold=True))
        self.top += 22

    def _note(self, text: str) -> None:
        self.shapes.append(Words(MARGIN + LABELS, self.top + 12, text, "soft"))
        self.top += ROW

    def _row(self, row: Row, several_experts: bool) -> None:
        parts = [*([row.expert] if several_experts else []), row.branch]
        label = ", ".join(parts) + ("" if row.units == (WHOLE,) else f": {row.label}")
        self.shapes.append(Words(MARGIN + LABELS - 10, self.top + 13, short(label, LABELS - 10), at_end=True))
        for cell in row.cells:
            title = f"step {cell.step}, {label}: {_in_words(cell)}"
            width = self.column - (2 if self.column > 9 else 1)
            self.shapes.append(Box(self._left(cell.step), self.top, width, ROW - 4, *_look(cell), title))
        self.top += ROW
        self._values(row)

    def _values(self, row: Row) -> None:
        """The numbers that were decided by, as a curve with its threshold."""
        values = _numbers(row, "value")
        if not values:
            return
        limits = _numbers(row, "threshold")
        high = max(value for _, value in [*values, *limits])
        low = min(0.0, *(value for _, value in [*values, *limits]))
        high = high if high > low else low + 1.0
        bottom, height = self.top + STRIP - 6, STRIP - 12

        def points(of: Sequence[tuple[int, float]]) -> tuple[tuple[float, float], ...]:
            return tuple(
                (self._left(step) + self.column / 2 - 1, bottom - (value - low) / (high - low) * height)
                for step, value in of
            )

        right = self._left(self.steps) - 2
        self.shapes.append(Curve(((self._left(0), bottom), (right, bottom)), "base"))
        if limits:
            self.shapes.append(Curve(_stairs(points(limits), self.column), "threshold", "threshold"))
        self.shapes.append(Curve(points(values), "value", "what the policy decided by"))
        said = [f"decided by, {low:.3g} to {high:.3g}", *([f"threshold {limits[-1][1]:.3g}"] if limits else [])]
        for place, text in enumerate(said):
            base = bottom - 18 + 15 * place
            self.shapes.append(Words(MARGIN + LABELS - 10, base, short(text, LABELS - 10), "soft", at_end=True))
        self.top += STRIP

    def _steps(self) -> None:
        every = next(each for each in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if each * self.column >= 26)
        for step in range(0, self.steps, every):
            left = self._left(step) + self.column / 2 - 1
            self.shapes.append(Words(left, self.top + 12, str(step), "soft", centered=True))
        self.shapes.append(Words(MARGIN + LABELS - 10, self.top + 12, "step", "soft", at_end=True))
        self.top += ROW + 8

    def _left(self, step: int) -> float:
        return MARGIN + LABELS + step * self.column


def _numbers(row: Row, name: Literal["value", "threshold"]) -> list[tuple[int, float]]:
    """Step and number of every cell that has one that can be drawn."""
    found = [(cell.step, getattr(cell, name)) for cell in row.cells]
    return [(step, number) for step, number in found if number is not None and math.isfinite(number)]


def _look(cell: Cell) -> tuple[Kind, float]:
    if not cell.computed:
        return "reused", 1.0
    shade = 1.0 if cell.density is None else PALEST + (1 - PALEST) * min(max(cell.density, 0.0), 1.0)
    return ("audited" if cell.reason == "audit" else "forced" if cell.is_forced else "computed"), shade


def _in_words(cell: Cell) -> str:
    parts = [f"{'computed' if cell.computed else 'reused'} ({cell.reason})"]
    parts += [f"decided by {cell.value:.4g}"] if cell.value is not None else []
    parts += [f"threshold {cell.threshold:.4g}"] if cell.threshold is not None else []
    parts += [f"attention kept {cell.density:.1%}"] if cell.density is not None else []
    return ", ".join(parts)


def _stairs(points: tuple[tuple[float, float], ...], column: float) -> tuple[tuple[float, float], ...]:
    """The curve level within each cell, so that a change is seen at the step it came with."""
    return tuple((x + side * column / 2, y) for x, y in points for side in (-1, 1))


def _said(reports: Sequence[CacheReport]) -> str:
    parts = []
    for report in reports:
        cells = [cell.computed for row in report.rows for cell in row.cells]
        parts.append(f"{report.name or 'cache'}: {sum(cells)} of {len(cells)} cells computed")
    return f"Schedule by step. {'; '.join(parts)}."
