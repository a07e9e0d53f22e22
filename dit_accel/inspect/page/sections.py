"""The sections of the report that are tables of what was measured and with what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from statistics import fmean

from ..recorder import Record
from .layout import Section, breakable, folded
from .tables import Cell, cell_table, plain_table, ramp_cell, ramp_legend, word_table
from .words import USUAL, layer_code

GOES = {
    "first_frame": "first frame",
    "same_frame": "own frame",
    "same_position": "own place, other frames",
    "text": "text and others",
}


def recall_map(report: Record) -> Section:
    """Layers by heads: what the heaviest fifth of the blocks holds."""
    layers = report["layers"]
    rows = [(layer_code(layer, layers), _recall_cells(layer)) for layer in layers]
    block = next(iter(layers[0]["recall"]))
    return Section(
        "Concentration by head",
        f"<p>Attention in the heaviest 20% of the blocks of {block} tokens; uniform attention would have 20 "
        "everywhere. Light heads can be made sparse at little loss, dark ones look at everything.</p>"
        f"{ramp_legend('Recall', '0%', '100%')}{cell_table('Recall at 20% of the blocks, in percent', rows)}",
    )


def shares(report: Record) -> Section | None:
    """Where attention goes, layer by layer."""
    layers = report["layers"]
    present = {name: words for name, words in GOES.items() if any(layer["shares"][name] for layer in layers)}
    if not present:
        return None
    rows = [[layer_code(layer, layers), *(_spread(layer["shares"][name]) for name in present)] for layer in layers]
    uniform = {tuple(_percent(uniform_share(layer, name)) for name in present) for layer in layers}
    compared = []
    if len(uniform) == 1:
        compared.append(["uniform attention", *(f"{value} <small></small>" for value in uniform.pop())])
    table = plain_table("Shares by layer", ["layer", *present.values()], rows, ("For comparison", compared))
    return Section(
        "Shares of attention",
        "<p>Mean over heads, then the lowest and the highest head. Shares of frames are of the attention among visual "
        f"tokens; that of the first frame is for queries outside it.</p>{table}",
    )


def uniform_share(layer: Record, name: str) -> float:
    """What uniform attention would give, in [0, 1].

    Args:
        layer: of the report.
        name: of a share.
    """
    frames, tokens, text = layer["grid"][0], layer["tokens"], layer["text_tokens"]
    if name == "text":
        return float(text / (tokens + text))
    return float((frames - 1) / tokens if name == "same_position" else 1 / frames)


def settings(report: Record) -> Section:
    """Everything that the figures depend on."""
    named = {**report["settings"], "at": report["at"], **report["environment"], "seconds": report["seconds"]}
    rows = [(breakable(name), escape(_plain(value))) for name, value in named.items()]
    tried = [(breakable(name), _settings(chosen)) for name, chosen in report["methods"].items()]
    methods = folded("Settings of the methods", word_table("As in the first layer", tried)) if tried else ""
    run = folded("The run", word_table("What was sampled, and where", rows), is_open=True)
    return Section("Settings", f"{run}{methods}")


def _recall_cells(layer: Record) -> list[Cell | None]:
    recall = next(iter(layer["recall"].values()))
    if not recall or USUAL not in recall:
        return [None] * int(layer["heads"])
    return [ramp_cell(value, f"{layer['path']}, head {head}: {value:.1%}") for head, value in enumerate(recall[USUAL])]


def _spread(values: Sequence[float] | None) -> str:
    if not values:
        return "&ndash;"
    low, high = (_percent(value) for value in (min(values), max(values)))
    return f"{_percent(fmean(values))} <small>{low} &ndash; {high}</small>"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _settings(chosen: Record) -> str:
    """Names and values, as one would write them in a call; what is off is left out."""
    given = {name: value for name, value in chosen.items() if value is not None}
    return f"<code>{escape(', '.join(f'{name}={_short(value)}' for name, value in given.items()))}</code>"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
