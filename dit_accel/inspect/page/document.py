"""All sections in one page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from ..inspection import Pictures
from ..recorder import Record
from . import best, curves, maps, sections, top
from .layout import contents
from .style import PAGE, STYLE


def report_page(report: Record, pictures: Mapping[tuple[str, str], Pictures]) -> str:
    """The report as HTML: one file, without scripts, readable in light and dark and on paper.

    Args:
        report: as in ``report.json``, see :func:`dit_accel.inspect.report.build_report`.
        pictures: from :meth:`.InspectionRecorder.pictures`.
    """
    parts = [
        top.summary(report),
        best.best_methods(report),
        top.to_try(report),
        sections.recall_map(report),
        curves.recall_curves(report),
        curves.decay_curves(report),
        sections.shares(report),
        maps.maps(report, pictures),
        sections.settings(report),
    ]
    found = [part for part in parts if part is not None]
    return PAGE.substitute(
        title=escape(f"Attention of {report['settings']['model']}"),
        style=STYLE,
        header=top.header(report) + contents(found),
        main="\n".join(part.html() for part in found),
    )
