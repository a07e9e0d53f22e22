"""The top of the report: what was inspected, what was found, and what to try."""

from __future__ import annotations

from html import escape
from statistics import fmean

from ..recorder import Record
from .layout import Section, breakable, folded
from .words import CAUTION, findings, grids, next_best, recalls, suggestion_code, suggestion_json


def header(report: Record) -> str:
    """What was inspected, with which words."""
    settings = report["settings"]
    return (
        f"<h1>The attention of {breakable(settings['model'])}</h1><p class='soft'>{escape(settings['pipeline'])}, "
        f"{settings['steps']} steps, seed {settings['seed']}; the prompt:</p>"
        f"<blockquote>{escape(settings['prompt'])}</blockquote>"
    )


def summary(report: Record) -> Section:
    """The findings in a few numbers and sentences."""
    said = "".join(
        f"<div{' class=caution' if name == CAUTION else ''}><dt>{escape(name)}</dt>"
        f"<dd>{'<br>'.join(map(escape, sentences))}</dd></div>"
        for name, sentences in findings(report)
    )
    return Section("In short", f"{_tiles(report)}<dl>{said}</dl>")


def to_try(report: Record) -> Section | None:
    """Settings to paste; None if no method is suggested."""
    code, same = suggestion_code(report), suggestion_json(report)
    if code is None or same is None:
        return None
    json = folded("The same as JSON", f"<pre class='wrap' tabindex='0'><code>{escape(same)}</code></pre>")
    return Section(
        "Settings to try",
        "<p>They follow from these figures alone and were not rendered with; compare before you rely on them. Budgets "
        f"are factors on the method's own.</p><pre tabindex='0'><code>{escape(code)}</code></pre>{json}",
    )


def _tiles(report: Record) -> str:
    layers, advice = report["layers"], report["advice"]
    values, name = recalls(layers), advice["method"]
    tiles = []
    if name is not None:
        after = next_best(report)
        error = f"mean output error, of the norm of dense attention{f'; {after}' if after else ''}"
        tiles.append((name, f"has the smallest output error at a density of {report['density']:.0%}"))
        tiles.append((f"{advice['methods'][name]['error']:.1%}", error))
    if values:
        tiles.append((f"{fmean(values):.0%}", "of the attention lies in the heaviest 20% of the blocks"))
    largest = max(layers, key=lambda layer: layer["tokens"])
    tiles.append((f"{largest['tokens']:,}", f"visual tokens, {grids([largest])[0]} (frames x height x width)"))
    items = "".join(f"<li><b>{breakable(big)}</b><span>{escape(small)}</span></li>" for big, small in tiles)
    return f"<ul class='tiles'>{items}</ul>"
