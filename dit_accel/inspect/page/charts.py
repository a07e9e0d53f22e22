"""Line charts as inline SVG, written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

Point = tuple[float, float]


class Line(NamedTuple):
    """One line of a chart.

    Attributes:
        points: in the units of the axes; gaps are not drawn.
        kind: CSS class: ``"one"`` for thin, ``"mean"`` for thick, ``"fit"`` for dashed, ``"poor"`` for dotted and
            pale, ``"base"`` for what is compared with, ``"dots"`` for dots alone.
        title: shown when pointed at.
    """

    points: Sequence[Point]
    kind: str
    title: str = ""


class Axis(NamedTuple):
    """One axis.

    Attributes:
        low: value at its start.
        high: value at its end, above ``low``.
        ticks: values that are marked.
        label: what it shows.
        logarithmic: whether equal distances are equal ratios.
        percent: whether values are written as percent.
    """

    low: float
    high: float
    ticks: Sequence[float]
    label: str
    logarithmic: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """Where a value is, from 0 to 1."""
        low, high = (math.log(v) if self.logarithmic else v for v in (self.low, self.high))
        value = math.log(max(value, 1e-9)) if self.logarithmic else value
        return (value - low) / (high - low)

    def text(self, value: float) -> str:
        """How a tick is written."""
        if self.logarithmic and 0 < value < 1:
            return f"1/{1 / value:g}"
        return f"{value * 100:g}%" if self.percent else f"{value:g}"


def chart(title: str, lines: Sequence[Line], x: Axis, y: Axis, width: int = 420, height: int = 280) -> str:
    """An SVG with axes, a grid and lines.

    Args:
        title: what it shows; read aloud in its place.
        lines: drawn in this order.
        x: the axis across.
        y: the axis up.
        width: of the picture, in pixels before it is scaled.
        height: likewise.
    """
    left, bottom, top, right = 52, 40, 10, 24
    box = (left, top, width - left - right, height - top - bottom)
    parts = [_grid(x, y, box), *(_line(line, x, y, box) for line in lines)]
    across, up = left + box[2] / 2, -(top + box[3] / 2)
    labels = (
        f'<text x="{across:g}" y="{height - 6}" text-anchor="middle">{escape(x.label)}</text>'
        f'<text transform="rotate(-90)" x="{up:g}" y="13" text-anchor="middle">{escape(y.label)}</text>'
    )
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}{labels}</svg>"
    )


def logarithmic_axis(values: Sequence[float], label: str) -> Axis:
    """An axis of powers of two that holds all positive values; 1 is marked where it is on it."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log2(min(positive))), math.ceil(math.log2(max(positive)))
    low, high = max(low, -10), max(high, max(low, -10) + 1)
    step = max(1, math.ceil((high - low) / 5))
    ticks = [2.0**power for power in range(low, high + 1) if power % step == 0]
    return Axis(2.0**low, 2.0**high, ticks, label, logarithmic=True)


def whole_axis(last: int, label: str) -> Axis:
    """An axis of whole numbers from 0 on."""
    step = max(1, math.ceil(last / 6))
    return Axis(0, max(last, 1), list(range(0, max(last, 1) + 1, step)), label)


def _grid(x: Axis, y: Axis, box: tuple[int, int, int, int]) -> str:
    left, top, width, height = box
    parts = [f'<rect class="frame" x="{left}" y="{top}" width="{width}" height="{height}"/>']
    for value in x.ticks:
        at = left + x.place(value) * width
        parts.append(f'<path class="grid" d="M{at:.1f} {top}V{top + height}"/>')
        parts.append(f'<text x="{at:.1f}" y="{top + height + 15}" text-anchor="middle">{x.text(value)}</text>')
    for value in y.ticks:
        at = top + (1 - y.place(value)) * height
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{left + width}"/>')
        parts.append(f'<text x="{left - 5}" y="{at + 4:.1f}" text-anchor="end">{y.text(value)}</text>')
    return "".join(parts)


def _line(line: Line, x: Axis, y: Axis, box: tuple[int, int, int, int]) -> str:
    left, top, width, height = box
    title = f"<title>{escape(line.title)}</title>" if line.title else ""
    spots = [(left + x.place(a) * width, top + (1 - min(max(y.place(b), 0), 1)) * height) for a, b in line.points]
    if line.kind == "dots":
        dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in spots)
        return f'<g class="dots">{title}{dots}</g>'
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)
    return f'<path class="{line.kind}" d="{path}">{title}</path>' if spots else ""
