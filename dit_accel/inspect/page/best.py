"""The section of the report that compares methods: by head, over all, and by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from ..inspection import is_fair
from ..recorder import Record
from .colors import method_colors, method_letters
from .layout import Section
from .tables import Cell, bar, cell_table, plain_table, ramp_cell, ramp_legend
from .words import layer_code

EXPLAINED = (
    "<b>Output error</b>: the norm of what a method's output is off by, in percent of the norm of dense attention; "
    "mean over all heads, and the worst of them. <b>Attention kept</b>: softmax mass on the pairs that are computed; "
    "what is added to make up for the others does not count. <b>Density</b>: pairs that are computed, of all."
)


def best_methods(report: Record) -> Section | None:
    """The best method for each head, all methods over all heads, and over each layer."""
    names = ranked(report)
    if not names:
        return None
    layers, tried = report["layers"], list(report["advice"]["methods"])
    colors, letters = method_colors(tried), method_letters(tried)
    marks = {name: f'<span class="mark" style="background:{colors[name]}">{letters[name]}</span>' for name in tried}
    rows = [(layer_code(layer, layers), _best_cells(layer, colors, letters)) for layer in layers]
    everything = f"<div><h3>Over all heads</h3>{_method_table(report, names, marks)}</div>"
    heads = f"<div><h3>The best for each head</h3>{cell_table('Smallest output error, in percent', rows)}</div>"
    return Section(
        "Methods compared",
        f"<p>Every method at a density of {report['density']:.0%}, on the queries, keys and values of this model. "
        "Those that cannot be that sparse in a layer do not take part there.</p>"
        f"<div class='beside'>{everything}{heads}</div><p class='note'>{EXPLAINED}</p>"
        f"<h3>By layer</h3>{_error_table(report, names, marks)}",
    )


def ranked(report: Record) -> list[str]:
    """The methods that acted anywhere, by their mean error; those that are not sparse enough follow."""
    found = report["advice"]["methods"]
    acted = [name for name in found if found[name]["error"] is not None]
    return sorted(acted, key=lambda name: (not found[name]["fair"], found[name]["error"]))


def _best_cells(layer: Record, colors: Mapping[str, str], letters: Mapping[str, str]) -> list[Cell | None]:
    cells: list[Cell | None] = []
    for head, name in enumerate(layer["best"]):
        if name is None:
            cells.append(None)
            continue
        error, recall = (layer["methods"][name][figure][head] for figure in ("error", "recall"))
        title = f"{layer['path']}, head {head}: {name}, error {error:.1%}, attention kept {recall:.1%}"
        cells.append(Cell(f"{letters[name]} {error * 100:.0f}", colors[name], "#ffffff", title))
    return cells


def _method_table(report: Record, names: Sequence[str], marks: Mapping[str, str]) -> str:
    found, total = report["advice"]["methods"], len(report["layers"])
    is_partial = any(found[name]["layers"] < total for name in names)
    longest = max(found[name]["error"] for name in names)

    def row(name: str) -> list[str]:
        figures = found[name]
        error = figures["error"]
        drawn = bar(error / longest if longest else 0, f"{error:.1%}")
        worst = max(max(layer["methods"][name]["error"]) for layer in report["layers"] if name in layer["methods"])
        parts = [f"{value:.1%}" for value in (worst, figures["recall"], figures["density"])]
        layers = [f"{figures['layers']} of {total}"] if is_partial else []
        return [f"{marks[name]}{escape(name)}", drawn, *parts, str(figures["heads_won"]), *layers]

    header = ["method", "output error", "worst head", "attention kept", "density", "heads won"]
    fair, others = ([row(name) for name in names if found[name]["fair"] is kind] for kind in (True, False))
    reason = "Not ranked: denser than asked for" + (", or not on every layer" if is_partial else "")
    return plain_table("All methods", [*header, *(["layers"] if is_partial else [])], fair, (reason, others))


def _error_table(report: Record, names: Sequence[str], marks: Mapping[str, str]) -> str:
    layers = report["layers"]
    acted = [[name for name in names if name in layer["methods"]] for layer in layers]
    errors = [
        {name: fmean(layer["methods"][name]["error"]) for name in found}
        for layer, found in zip(layers, acted, strict=True)
    ]
    most = max((value for row in errors for value in row.values()), default=0.0) or 1.0

    def cell(layer: Record, row: Mapping[str, float], name: str) -> Cell | None:
        if name not in row:
            return None
        densities = layer["methods"][name]["density"]
        text = f"{row[name] * 100:.0f}" if is_fair(densities, report["density"]) else f"({row[name] * 100:.0f})"
        title = f"{layer['path']}, {name}: error {row[name]:.1%} at a density of {fmean(densities):.1%}"
        return ramp_cell(row[name], title, text, most)

    rows = [
        (layer_code(layer, layers), [cell(layer, row, name) for name in names])
        for layer, row in zip(layers, errors, strict=True)
    ]
    columns = [f'<abbr title="{escape(name)}">{marks[name]}</abbr>' for name in names]
    legend = ramp_legend("Mean output error", "0%", f"{most:.0%}")
    caption = "In percent; parentheses: denser than asked for"
    return f"{legend}{cell_table(caption, rows, 'method', columns)}"
