"""The findings in sentences, for the top of the report and for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from statistics import fmean

from ..advice import HARD_ERROR
from ..inspection import UNLIKE
from ..recorder import Record
from .layout import breakable

LINE, PER_LINE = 90, 8  # of the suggested code: characters of a line, layers on one if they do not fit
USUAL = "0.2"  # the density whose recall is spoken of
GOOD_FIT = 0.5
CAUTION = "Caution"  # what the reader has to know about all figures


def findings(report: Record) -> list[tuple[str, list[str]]]:
    """What was run, what was found, and what follows: subjects and their sentences; plain text, without the prompt."""
    layers = report["layers"]
    found = {
        "Measured": [_run(report)],
        CAUTION: _unlike(layers),
        "Concentration": [_recall(layers)],
        "Distance": _decay(layers),
        "Shares": _shares(layers),
        "Methods": [*_method(report), *_refused(report)],
        "Hard layers": _hard(report),
    }
    return [(subject, said) for subject, said in found.items() if said]


def sentences(report: Record) -> list[str]:
    """The same without the subjects."""
    return [sentence for _, said in findings(report) for sentence in said]


def suggestion_code(report: Record) -> str | None:
    """The suggested settings as Python to paste; None if no method is suggested."""
    suggestion = report["advice"]["suggestion"]
    if suggestion is None:
        return None
    arguments = "".join(f"    {name}={_python(value)},\n" for name, value in suggestion.items())
    return f"dit_accel.accelerate(\n    pipe,\n{arguments})"


def suggestion_json(report: Record) -> str | None:
    """The same as JSON; None if no method is suggested."""
    suggestion = report["advice"]["suggestion"]
    return None if suggestion is None else json.dumps(suggestion)


def layer_name(layer: Record, layers: Sequence[Record]) -> str:
    """How a layer is called: its path, after its expert where there are several."""
    several = len({other["expert"] for other in layers}) > 1
    return f"{layer['expert']}: {layer['path']}" if several else str(layer["path"])


def layer_code(layer: Record, layers: Sequence[Record]) -> str:
    """The same as HTML."""
    return f"<code>{breakable(layer_name(layer, layers))}</code>"


def recalls(layers: Sequence[Record], density: str = USUAL) -> list[float]:
    """The recall of all heads at a density, for the smallest blocks."""
    first = [next(iter(layer["recall"].values())) for layer in layers]
    return [value for recall in first if recall and density in recall for value in recall[density]]


def grids(layers: Sequence[Record]) -> list[str]:
    """The token grids, each once, in order."""
    return list(dict.fromkeys(" x ".join(str(side) for side in layer["grid"]) for layer in layers))


def _run(report: Record) -> str:
    settings, layers = report["settings"], report["layers"]
    steps = "s" * (len(report["at"]) > 1) + " " + ", ".join(str(step) for step in report["at"])
    tokens = max(layer["tokens"] for layer in layers)
    text = max(layer["text_tokens"] for layer in layers)
    heads = sum(layer["heads"] for layer in layers)
    grid = ", ".join(grids(layers))
    return (
        f"{settings['model']} ({settings['pipeline']}) was sampled in {settings['steps']} steps; at step{steps} "
        f"(counted from 0) {len(layers)} attention layers with {heads} heads in all were measured, on a token grid "
        f"(frames x height x width) of {grid}: up to {tokens:,} visual tokens"
        + (f" and {text:,} others, such as text." if text else ".")
    )


def _recall(layers: Sequence[Record]) -> str:
    values, block = recalls(layers), next(iter(layers[0]["recall"]))
    if not values:
        return f"There are too few tokens to speak of blocks: fewer than ten blocks of {block}."
    return (
        f"The heaviest 20% of the blocks of {block} tokens hold {fmean(values):.0%} of the attention on average, from "
        f"{min(values):.0%} to {max(values):.0%} by head; uniform attention would give 20%."
    )


def _decay(layers: Sequence[Record]) -> list[str]:
    found = []
    for name, unit, where in (("frames", "frames", ""), ("space", "tokens", " within a frame")):
        fits = [layer[name] for layer in layers if layer[name] and layer[name]["rate"] is not None]
        if not fits:
            continue
        good = [fit for fit in fits if fit["r_squared"] >= GOOD_FIT and fit["rate"] > 0]
        if not good:
            found.append(f"In no layer does attention fall off exponentially with the distance in {unit}{where}.")
            continue
        half = math.log(2) / fmean(fit["rate"] for fit in good)
        found.append(
            f"With the distance in {unit}{where}, attention falls off exponentially (R² of {GOOD_FIT:g} or more) in "
            f"{len(good)} of {len(fits)} layers, there by half every {half:.1f} {unit} on average."
        )
    return found


def _shares(layers: Sequence[Record]) -> list[str]:
    said = {
        "same_frame": "a token's own frame",
        "first_frame": "the first frame",
        "same_position": "its own place in other frames",
        "text": "text and other tokens that are not visual",
    }
    parts = []
    for name, words in said.items():
        values = [value for layer in layers if layer["shares"][name] for value in layer["shares"][name]]
        if values:
            parts.append(f"{words} {fmean(values):.0%}")
    return [f"Shares of the attention: {', '.join(parts)}."] if parts else []


def _method(report: Record) -> list[str]:
    methods, name, density = report["advice"]["methods"], report["advice"]["method"], report["density"]
    if not methods:
        return ["No methods were compared."]
    if name is None:
        return [f"No method could be compared in all layers at a density of {density:.0%}."]
    found, after = methods[name], next_best(report)
    heads = sum(layer["heads"] for layer in report["layers"])
    first = (
        f"At a density of {density:.0%}, {name} loses least: its output is off by {found['error']:.1%} of the norm of "
        f"dense attention on average{f'; {after}' if after else ''}. It is the best method for "
        f"{found['heads_won']} of {heads} heads."
    )
    dense = [f"{m} ({row['density']:.0%})" for m, row in methods.items() if not row["fair"] and row["layers"]]
    return [
        first,
        *([f"Not as sparse as asked for in all layers, so not ranked: {', '.join(dense)}."] if dense else []),
    ]


def next_best(report: Record) -> str:
    """The second best method and its error; nothing if there is none."""
    methods, name = report["advice"]["methods"], report["advice"]["method"]
    others = {other: found["error"] for other, found in methods.items() if found["fair"] and other != name}
    if not others:
        return ""
    second = min(others, key=lambda other: others[other])
    return f"{second} is next with {others[second]:.1%}"


def _hard(report: Record) -> list[str]:
    advice = report["advice"]
    if advice["method"] is None:
        return []
    if not advice["hard_layers"]:
        both = f"both twice the usual error and more than {HARD_ERROR:.0%} of its output"
        return [f"No layer stands out as hard: none is off by {both}."]
    layers = ", ".join(str(layer) for layer in advice["hard_layers"])
    worst = max(advice["error_by_layer"].values())
    if len(advice["hard_layers"]) == 1:
        return [f"Layer {layers} stays hard, with an error of {worst:.0%}: keep it dense."]
    return [f"Layers {layers} stay hard, with an error of up to {worst:.0%}: keep them dense."]


def _refused(report: Record) -> list[str]:
    refused = report["not_compared"].items()
    return [f"Not compared: {reason if name in reason else f'{name}, since {reason}'}." for name, reason in refused]


def _unlike(layers: Sequence[Record]) -> list[str]:
    odd = [layer for layer in layers if layer["unlike"] > UNLIKE]
    if not odd:
        return []
    return [
        f"Caution: in {len(odd)} layers the model's own attention differs from plain softmax attention by up to "
        f"{max(layer['unlike'] for layer in odd):.0%}, so it masks or scales; figures there are of the plain kind."
    ]


def _python(value: object, indent: int = 4) -> str:
    """A value as Python; what does not fit a line takes one for each entry.

    Layers, which JSON has as text, are numbers.
    """
    if not isinstance(value, dict):
        return json.dumps(value) if isinstance(value, str) else repr(value)
    is_by_layer = all(str(key).isdecimal() for key in value)
    keys = map(str, value) if is_by_layer else map(json.dumps, value)
    entries = [f"{key}: {_python(item, indent + 4)}" for key, item in zip(keys, value.values(), strict=True)]
    line = ", ".join(entries)
    if is_by_layer and len(line) <= LINE - indent:
        return "{" + line + "}"
    space, end = " " * (indent + 4), " " * indent
    each = PER_LINE if is_by_layer and not any(isinstance(item, list) for item in value.values()) else 1
    rows = [", ".join(entries[start : start + each]) for start in range(0, len(entries), each)]
    return "{\n" + "".join(f"{space}{row},\n" for row in rows) + end + "}"
