"""The schedule as pixels, for places that show no SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..report.cache_report import CacheReport
from .page import schedule
from .shapes import SIZE, Box, Curve, Drawing, Words

if TYPE_CHECKING:
    from PIL.Image import Image

Color = tuple[int, int, int]
LIGHT: dict[str, Color] = {
    "paper": (251, 251, 249),
    "ink": (28, 30, 33),
    "soft": (85, 89, 95),
    "rule": (185, 188, 193),
    "line": (27, 108, 168),
    "accent": (163, 67, 26),
}
DARK: dict[str, Color] = {
    "paper": (19, 21, 24),
    "ink": (236, 238, 240),
    "soft": (169, 176, 184),
    "rule": (85, 91, 99),
    "line": (125, 184, 234),
    "accent": (240, 160, 112),
}


def schedule_png(reports: Sequence[CacheReport], *, dark: bool = False, scale: int = 2) -> bytes:
    """The schedule of the latest generation as a PNG file.

    Args:
        reports: one for each cache.
        dark: whether the ground is dark.
        scale: pixels for each unit of the SVG.

    Raises:
        ValueError: if there is nothing to draw, or the scale is below 1.
    """
    if scale < 1:
        raise ValueError(f"scale is a whole number from 1; got {scale}")
    file = io.BytesIO()
    paint(schedule(reports), DARK if dark else LIGHT, scale).save(file, format="PNG")
    return file.getvalue()


def paint(drawing: Drawing, colors: dict[str, Color], scale: int) -> Image:
    """A drawing as an image."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (round(drawing.width * scale), round(drawing.height * scale)), colors["paper"])
    pen = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        if isinstance(shape, Box):
            _box(pen, shape, colors, scale)
        elif isinstance(shape, Words):
            _words(pen, shape, colors, scale)
        else:
            _curve(pen, shape, colors, scale)
    return image


def _box(pen: Any, box: Box, colors: dict[str, Color], scale: int) -> None:
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    left, top, right, bottom = (round(part * scale) for part in corners)
    right, bottom = max(right - 1, left), max(bottom - 1, top)
    if box.kind == "reused":
        pen.rectangle((left, top, right, bottom), outline=colors["rule"], width=max(1, scale // 2))
        return
    outline = colors["accent"] if box.kind == "audited" else None
    fill = _mixed(colors["line"], colors["paper"], box.shade)
    pen.rectangle((left, top, right, bottom), fill=fill, outline=outline, width=2 * scale if outline else 0)
    if box.kind == "forced":
        pen.rectangle((left, bottom - 4 * scale + 1, right, bottom - 2 * scale - 1), fill=colors["paper"])


def _words(pen: Any, words: Words, colors: dict[str, Color], scale: int) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(SIZE * scale)
    anchor = "rs" if words.at_end else "ms" if words.centered else "ls"
    place = (words.left * scale, words.base * scale)
    pen.text(place, words.text, fill=colors[words.tone], font=font, anchor=anchor, stroke_width=words.is_bold * 0.5)


def _curve(pen: Any, curve: Curve, colors: dict[str, Color], scale: int) -> None:
    points = [(x * scale, y * scale) for x, y in curve.points]
    if curve.kind == "threshold":
        for start, end in pairwise(points):
            _dashes(pen, start, end, colors["accent"], scale)
        return
    color = colors["ink" if curve.kind == "value" else "rule"]
    pen.line(points, fill=color, width=scale)
    for x, y in points if curve.kind == "value" else ():
        pen.ellipse((x - 1.6 * scale, y - 1.6 * scale, x + 1.6 * scale, y + 1.6 * scale), fill=color)


def _dashes(pen: Any, start: tuple[float, float], end: tuple[float, float], color: Color, scale: int) -> None:
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    count = max(1, round(length / (8 * scale)))
    for index in range(count):
        parts = (index / count, (index + 0.6) / count)
        pen.line(
            [tuple(a + (b - a) * part for a, b in zip(start, end, strict=True)) for part in parts],
            fill=color,
            width=round(1.5 * scale),
        )


def _mixed(color: Color, ground: Color, share: float) -> Color:
    red, green, blue = (round(a * share + b * (1 - share)) for a, b in zip(color, ground, strict=True))
    return red, green, blue
