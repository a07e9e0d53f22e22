"""What a picture is made of, before it is SVG or pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["computed", "forced", "audited", "reused"]
Tone = Literal["ink", "soft"]
SIZE = 12  # of letters, in pixels
WIDE = 0.56  # of letters, over their size, on average


@dataclass(frozen=True)
class Box:
    """A cell.

    Attributes:
        left: of its corner, in pixels.
        top: likewise.
        width: of the box.
        height: of the box.
        kind: what it stands for.
        shade: from 0 to 1, how dark a computed cell is.
        title: shown when it is pointed at.
    """

    left: float
    top: float
    width: float
    height: float
    kind: Kind
    shade: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Words:
    """A line of text.

    Attributes:
        left: where it starts, or ends if ``at_end``.
        base: of the line, in pixels from the top.
        text: not escaped.
        tone: how much it stands out.
        is_bold: whether it is a heading.
        at_end: whether it ends at ``left``.
        centered: whether its middle is at ``left``.
    """

    left: float
    base: float
    text: str
    tone: Tone = "ink"
    is_bold: bool = False
    at_end: bool = False
    centered: bool = False


@dataclass(frozen=True)
class Curve:
    """A line through points.

    Attributes:
        points: in pixels.
        kind: ``"value"``, with a dot at each point, ``"threshold"`` (dashed), or ``"base"`` (thin).
        title: shown when it is pointed at.
    """

    points: tuple[tuple[float, float], ...]
    kind: Literal["value", "threshold", "base"]
    title: str = ""


@dataclass
class Drawing:
    """A picture.

    Attributes:
        width: in pixels.
        height: in pixels.
        title: the picture in one sentence, read aloud in its place.
        shapes: in the order in which they are drawn.
    """

    width: float
    height: float
    title: str
    shapes: list[Box | Words | Curve] = field(default_factory=list)


def short(text: str, width: float) -> str:
    """A text that fits a width in pixels, cut in its middle if need be."""
    most = max(3, int(width / (SIZE * WIDE)))
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
