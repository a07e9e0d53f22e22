"""Pieces that sections are put together from: the section itself, what folds, and what scrolls."""

from __future__ import annotations

import re
from html import escape
from typing import NamedTuple


class Section(NamedTuple):
    """One part of the page.

    Attributes:
        title: its heading, as text.
        body: what follows, as HTML.
    """

    title: str
    body: str

    @property
    def anchor(self) -> str:
        """What links in the page point at."""
        return re.sub("[^a-z0-9]+", "-", self.title.lower()).strip("-")

    def html(self) -> str:
        """The whole of it."""
        return f'<section id="{self.anchor}"><h2>{escape(self.title)}</h2>{self.body}</section>'


def contents(sections: list[Section]) -> str:
    """Links to all sections."""
    links = "".join(f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in sections)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def folded(summary: str, body: str, is_open: bool = False) -> str:
    """What the reader unfolds; ``summary`` and ``body`` are HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{body}</details>"


def scrolling(label: str, body: str) -> str:
    """What may be wider than the screen: reached by keyboard, and named for those who hear the page."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{body}</div>'


def breakable(name: str) -> str:
    """A name as HTML that may break after its dots and underscores."""
    return re.sub(r"(?<=[._])(?=\w)", "<wbr>", escape(name))
