"""Tables of the report: colored cells by layer and head, and plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .colors import RAMP, hexadecimal, ink, ramp
from .layout import scrolling

MANY = 12  # columns whose cells are narrower


class Cell(NamedTuple):
    """One colored cell.

    Attributes:
        text: what is written in it.
        color: its background.
        ink: color of the text.
        title: shown when pointed at.
    """

    text: str
    color: str
    ink: str
    title: str


def ramp_cell(value: float, title: str, text: str = "", most: float = 1.0) -> Cell:
    """A cell for a part of a whole, in percent; ``most`` has the lightest color."""
    color = ramp(value / most)
    return Cell(text or f"{value * 100:.0f}", hexadecimal(color), ink(color), title)


def cell_table(
    caption: str, rows: Sequence[tuple[str, Sequence[Cell | None]]], over: str = "head", names: Sequence[str] = ()
) -> str:
    """Rows of colored cells, one row for each layer; rows may differ in length.

    Args:
        caption: what the table shows.
        rows: name of the row, as HTML, and its cells; None where there is nothing to say.
        over: what the columns are.
        names: of the columns, as HTML; numbers from 0 if there are none.
    """
    width = max((len(cells) for _, cells in rows), default=0)
    look = "cells many" if width > MANY else "cells"
    columns = "".join(f'<th scope="col">{name}</th>' for name in names or map(str, range(width)))
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(map(_cell, cells))}</tr>' for name, cells in rows)
    return scrolling(
        caption,
        f'<table class="{look}"><caption>{escape(caption)}</caption><thead><tr><th scope="col" rowspan="2">layer</th>'
        f'<th scope="colgroup" colspan="{max(width, 1)}">{escape(over)}</th></tr><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table>",
    )


def plain_table(
    label: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    apart: tuple[str, Sequence[Sequence[str]]] = ("", ()),
) -> str:
    """A table of numbers.

    Args:
        label: what it shows, for those who hear the page.
        header: column names.
        rows: cells, as HTML; the first of each names its row.
        apart: a heading, and rows that follow under it.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    heading, others = apart
    more = ""
    if others:
        more = (
            f'<tbody class="apart"><tr><th scope="rowgroup" colspan="{len(header)}">{escape(heading)}</th></tr>'
            f"{_rows(others)}</tbody>"
        )
    return scrolling(
        label,
        f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{_rows(rows)}</tbody>{more}</table>',
    )


def word_table(label: str, rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, both as HTML; long ones go on in the next line."""
    body = "".join(f'<tr><th scope="row">{name}</th><td>{words}</td></tr>' for name, words in rows)
    return f'<table class="words"><caption>{escape(label)}</caption><tbody>{body}</tbody></table>'


def ramp_legend(what: str, low: str, high: str, middle: str = "") -> str:
    """The colors of quantities, from dark to light."""
    colors = ", ".join(map(hexadecimal, RAMP))
    said = f"{what}: {low} to {high}" + (f", {middle} in the middle" if middle else "")
    return (
        f'<div class="scale" role="img" aria-label="{escape(said)}"><b>{escape(what)}</b><i>'
        f'<span class="ramp" style="background:linear-gradient(90deg, {colors})"></span>'
        f"<span>{escape(low)}</span><span>{escape(middle)}</span><span>{escape(high)}</span></i></div>"
    )


def bar(part: float, text: str) -> str:
    """A number over a bar; ``part`` of 1 fills it."""
    return f'<span class="bar" style="--part:{min(max(part, 0.0), 1.0):.1%}">{escape(text)}</span>'


def _rows(rows: Sequence[Sequence[str]]) -> str:
    def row(name: str, *cells: str) -> str:
        return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'

    return "".join(row(*cells) for cells in rows)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return '<td title="not measured">&ndash;</td>'
    return (
        f'<td style="background:{cell.color};color:{cell.ink}" title="{escape(cell.title)}">{escape(cell.text)}</td>'
    )
