"""The schedule as SVG that follows the reader's light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..report.cache_report import CacheReport
from .page import schedule
from .shapes import SIZE, Box, Curve, Drawing, Words

STYLE = """
.schedule { --paper: #fbfbf9; --ink: #1c1e21; --soft: #55595f; --rule: #b9bcc1; --line: #1b6ca8; --accent: #a3431a; }
@media (prefers-color-scheme: dark) {
  .schedule { --paper: #131518; --ink: #eceef0; --soft: #a9b0b8; --rule: #555b63; --line: #7db8ea; --accent: #f0a070; }
}
.schedule text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
.schedule .soft { fill: var(--soft); }
.schedule .bold { font-weight: 600; font-size: 13px; }
.schedule .paper { fill: var(--paper); }
.schedule .computed, .schedule .forced, .schedule .audited { fill: var(--line); }
.schedule .audited { stroke: var(--accent); stroke-width: 2; }
.schedule .notch { fill: var(--paper); }
.schedule .reused { fill: none; stroke: var(--rule); }
.schedule path { fill: none; stroke: var(--rule); }
.schedule .value { stroke: var(--ink); stroke-width: 1.3; }
.schedule .dot { fill: var(--ink); stroke: none; }
.schedule .threshold { stroke: var(--accent); stroke-width: 1.6; stroke-dasharray: 5 3; }
"""


def schedule_svg(reports: Sequence[CacheReport]) -> str:
    """The schedule of the latest generation, one SVG element with its style inside.

    Args:
        reports: one for each cache.

    Raises:
        ValueError: if there is nothing to draw.
    """
    return svg(schedule(reports))


def svg(drawing: Drawing) -> str:
    """A drawing as SVG."""
    width, height = f"{drawing.width:g}", f"{drawing.height:g}"
    shapes = "\n".join(_shape(shape) for shape in drawing.shapes)
    title = escape(drawing.title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="schedule" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{title}"><title>{title}</title><style>{STYLE}</style>\n'
        f'<rect class="paper" width="{width}" height="{height}"/>\n{shapes}\n</svg>\n'
    )


def _shape(shape: Box | Words | Curve) -> str:
    if isinstance(shape, Box):
        return _box(shape)
    return _words(shape) if isinstance(shape, Words) else _curve(shape)


def _box(box: Box) -> str:
    inset = {"reused": 0.5, "audited": 1.0}.get(box.kind, 0.0)
    shade = f' fill-opacity="{box.shade:.3g}"' if box.shade < 1 else ""
    rect = _rect(box.left + inset, box.top + inset, box.width - 2 * inset, box.height - 2 * inset, box.kind, shade)
    notch = ""
    if box.kind == "forced":  # a bar below, so that nobody has to tell it by its color
        notch = _rect(box.left, box.top + box.height - 4, box.width, 1.6, "notch")
    return f"<g>{_title(box.title)}{rect}{notch}</g>"


def _rect(left: float, top: float, width: float, height: float, kind: str, more: str = "") -> str:
    return (
        f'<rect class="{kind}" x="{left:.5g}" y="{top:.5g}" width="{max(width, 0.5):.5g}" height="{height:.5g}"'
        f' rx="1"{more}/>'
    )


def _words(words: Words) -> str:
    kind = " ".join(name for name, on in (("soft", words.tone == "soft"), ("bold", words.is_bold)) if on)
    anchor = "end" if words.at_end else "middle" if words.centered else "start"
    return (
        f'<text x="{words.left:.5g}" y="{words.base:.5g}" font-size="{SIZE}" text-anchor="{anchor}"'
        f"{f' class={kind!r}' if kind else ''}>{escape(words.text)}</text>"
    )


def _curve(curve: Curve) -> str:
    path = "M" + "L".join(f"{x:.5g} {y:.5g}" for x, y in curve.points)
    dots = "".join(f'<circle class="dot" cx="{x:.5g}" cy="{y:.5g}" r="1.6"/>' for x, y in curve.points)
    line = f'<path class="{curve.kind}" d="{path}"/>'
    return f"<g>{_title(curve.title)}{line}{dots if curve.kind == 'value' else ''}</g>"


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
