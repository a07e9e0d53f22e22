"""Pictures of the tables: PSNR against speed, ours and others; and PSNR of every prompt against the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...caching.picture.shapes import Curve, Drawing, Words
from ...caching.picture.svg import svg
from ..report.records import Record
from .contender import PEERS, PRESETS

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760.0, 420.0, 60.0, 190.0, 40.0, 50.0  # of the picture and its margins
TICKS = 6
Point = tuple[float, float]


class Plane(NamedTuple):
    """Where values lie in the picture.

    Attributes:
        x: least and greatest value to the right.
        y: least and greatest value upward.
    """

    x: Point
    y: Point

    @classmethod
    def around(cls, points: Sequence[Point]) -> Plane:
        """One with room around these points."""
        return cls(*(_room([point[axis] for point in points]) for axis in (0, 1)))

    def at(self, point: Point) -> Point:
        """In pixels from the left and from the top."""
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def axes(self, right: str, upward: str) -> list[Curve | Words]:
        """Both axes with their ticks and names."""
        (left, right_end), (low, high) = self.x, self.y
        corner, end, top = self.at((left, low)), self.at((right_end, low)), self.at((left, high))
        shapes: list[Curve | Words] = [Curve((top, corner, end), "base")]
        for value in _ticks(self.x):
            shapes.append(Words(self.at((value, 0))[0], corner[1] + 18, f"{value:.3g}", "soft", centered=True))
        for value in _ticks(self.y):
            shapes.append(Words(LEFT - 8, self.at((0, value))[1] + 4, f"{value:.3g}", "soft", at_end=True))
        return [*shapes, Words(end[0], corner[1] + 38, right, at_end=True), Words(LEFT, TOP - 16, upward)]


def caches_figure(rows: Sequence[Record]) -> str | None:
    """The fronts of ours and of others: caches that no other of the group beats in both PSNR and speed.

    Args:
        rows: of the table of caches.

    Returns:
        SVG; None if there are no two points yet.
    """
    fronts = {group: front([row for row in rows if row["group"] == group]) for group in (PRESETS, PEERS)}
    points = [_point(row) for group in fronts.values() for row in group]
    if len(set(points)) < 2:
        return None
    plane = Plane.around(points)
    drawing = Drawing(WIDTH, HEIGHT, "Mean PSNR against speed-up of the sampling loop, presets and caches of others")
    drawing.shapes += plane.axes("speed-up of the sampling loop", "mean PSNR in dB: solid ours, dashed others")
    for group, members in fronts.items():
        line = tuple(plane.at(_point(row)) for row in members)
        drawing.shapes += [Curve(line, "base" if group == PRESETS else "threshold")] if len(line) > 1 else []
        for row, place in zip(members, line, strict=True):
            drawing.shapes += [Curve((place,), "value", row["name"]), _label(place, row["name"], group == PEERS)]
    return svg(drawing)


def targets_figure(table: Record) -> str | None:
    """PSNR of every held-out prompt above its target, with the speed-up of each target.

    Args:
        table: of the command with ``--targets``.

    Returns:
        SVG; None if there is nothing to draw yet.
    """
    found = {each["target_psnr"]: each for each in table["verdicts"]["targets"]}
    points = {
        row["settings"]["target_psnr"]: [run["psnr_db"] for run in row["prompts"] if run["psnr_db"] != "bit-equal"]
        for row in table["contenders"]
        if row["runs"]
    }
    pairs = [(target, value) for target, values in points.items() for value in values]
    if not pairs:
        return None
    plane = Plane.around([*pairs, *((target, target) for target in points)])
    drawing = Drawing(WIDTH, HEIGHT, "PSNR of every held-out prompt against the target that was tuned for")
    drawing.shapes += plane.axes("target in dB", "PSNR in dB: a dot for each held-out prompt; dashed: the target")
    ends = min(found), max(found)
    drawing.shapes.append(Curve(tuple(plane.at((end, end)) for end in ends), "threshold", "the target"))
    drawing.shapes += [Curve((plane.at(pair),), "value", f"{pair[1]} dB for {pair[0]:g}") for pair in pairs]
    for target, each in found.items():
        across, _ = plane.at((target, target))
        text = f"{each['speedup']:.2f} x, {each['met']}/{each['of']}"
        drawing.shapes.append(Words(across, TOP + 8, text, "soft", centered=True))
    return svg(drawing)


def front(rows: Sequence[Record]) -> list[Record]:
    """Those that no other one beats or equals in both, the fastest last; only rows of equally many prompts count."""
    most = max((row["runs"] for row in rows), default=0)
    whole = [row for row in rows if row["runs"] == most > 0 and row["psnr_db"]["mean"] != "bit-equal"]
    found: list[Record] = []
    for row in sorted(whole, key=_point, reverse=True):  # the fastest first
        if not found or _point(row)[1] > _point(found[-1])[1]:
            found.append(row)
    return found[::-1]


def _point(row: Record) -> Point:
    return row["speedup"]["median"], row["psnr_db"]["mean"]


def _label(place: Point, name: str, below: bool) -> Words:
    return Words(place[0] + 6, place[1] + (14 if below else -5), name, "soft" if below else "ink")


def _room(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    gap = 0.08 * (high - low) or 1.0
    return low - gap, high + gap


def _ticks(ends: Point) -> list[float]:
    low, high = ends
    return [low + (high - low) * (part + 0.5) / TICKS for part in range(TICKS)]
