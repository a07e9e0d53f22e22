"""The sections of the report that are charts: recall by density, and attention by distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from ..recorder import Record
from .charts import Axis, Line, chart, logarithmic_axis, whole_axis
from .layout import Section, folded
from .words import GOOD_FIT, USUAL, layer_code, layer_name

PERCENT = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = 12  # charts that are seen without unfolding the others
SMALL = (250, 170)


def recall_curves(report: Record) -> Section | None:
    """Recall by density, one chart for each block size."""
    layers = report["layers"]
    charts = [_recall_chart(layers, block) for block in layers[0]["recall"]]
    if not any(charts):
        return None
    legend = _legend(("one", "a layer"), ("mean", "mean of all layers"), ("even", "uniform attention"))
    return Section(
        "Recall by density",
        "<p>Attention that is kept, where each row of blocks keeps its heaviest ones: what no choice of as many "
        "blocks in each row can beat. Layers are means of their heads.</p>"
        f"{legend}<div class='charts'>{''.join(charts)}</div>",
    )


def decay_curves(report: Record) -> Section | None:
    """Attention by distance in frames and in space, with the fitted exponential."""
    parts = []
    for name, unit in (("frames", "frames"), ("space", "tokens")):
        charts = _decay_charts(report["layers"], name, unit)
        if charts:
            where = "By distance in frames" if name == "frames" else "By distance in space, within a frame"
            parts.append(f"<h3>{where}</h3>{_gallery(charts)}")
    if not parts:
        return None
    legend = _legend(
        ("dot", "measured"), ("base", "uniform attention"), ("fit", "a · exp(-r · distance)"), ("poor", "poor fit")
    )
    return Section(
        "Decay with distance",
        "<p>Mean weight of a token at each distance, as a multiple of uniform attention, over all queries and heads. "
        "The exponential is fitted to the logarithm; its fit is poor where R² is below "
        f"{GOOD_FIT:g}. All charts of a kind have the same scale.</p>{legend}{''.join(parts)}",
    )


def _recall_chart(layers: Sequence[Record], block: str) -> str:
    curves = [(layer, layer["recall"][block]) for layer in layers if layer["recall"][block]]
    if not curves:
        return ""
    lines = [Line([(0, 0), (1, 1)], "fit", "uniform attention")]
    each = [[(float(d), fmean(values)) for d, values in recall.items()] for _, recall in curves]
    for (layer, _), points in zip(curves, each, strict=True):
        lines.append(Line([(0, 0), *points, (1, 1)], "one", layer_name(layer, layers)))
    mean = [(column[0][0], fmean(value for _, value in column)) for column in zip(*each, strict=True)]
    lines.append(Line([(0, 0), *mean, (1, 1)], "mean", "mean of all layers"))
    said = ", ".join(f"{value:.0%} in {density:.0%}" for density, value in mean)
    x, y = (Axis(0, 1, PERCENT, words, percent=True) for words in ("blocks kept", "attention kept"))
    drawn = chart(f"Recall by density for blocks of {block} tokens; mean of all layers: {said}", lines, x, y)
    extremes = _extremes([(fmean(recall[USUAL]), layer) for layer, recall in curves if USUAL in recall], layers)
    return (
        f"<figure><figcaption><b>Blocks of {block} tokens</b></figcaption>{drawn}"
        f"<p class='note'>Mean: {said} of the blocks. {extremes}</p></figure>"
    )


def _extremes(found: Sequence[tuple[float, Record]], layers: Sequence[Record]) -> str:
    """Which layers are the highest and the lowest at the usual density."""
    if len(found) < 2:
        return ""
    (low, lowest), (high, highest) = (pick(found, key=lambda pair: pair[0]) for pick in (min, max))
    return (
        f"In {float(USUAL):.0%}, {layer_code(highest, layers)} has most ({high:.0%}) and {layer_code(lowest, layers)} "
        f"least ({low:.0%})."
    )


def _decay_charts(layers: Sequence[Record], name: str, unit: str) -> list[str]:
    """One for each layer, all with the same axes."""
    measured = [layer for layer in layers if layer[name]]
    if not measured:
        return []
    profiles = [layer[name]["profile"] for layer in measured]
    x = whole_axis(max(map(len, profiles)) - 1, f"{unit} apart")
    y = logarithmic_axis([1.0, *(value for profile in profiles for value in profile)], "times uniform")
    return [_decay_chart(layer, layers, name, unit, (x, y)) for layer in measured]


def _decay_chart(layer: Record, layers: Sequence[Record], name: str, unit: str, axes: tuple[Axis, Axis]) -> str:
    found = layer[name]
    points = [(float(distance), value) for distance, value in enumerate(found["profile"]) if value > 0]
    lines = [Line([(0, 1), (axes[0].high, 1)], "base", "uniform attention"), Line(points, "dots", "measured")]
    if found["rate"] is not None:
        kind = "fit" if found["r_squared"] >= GOOD_FIT else "poor"
        lines.append(Line(_fitted(points, found["rate"]), kind, f"fitted, rate {found['rate']:.3g}"))
    caption = fit_in_words(found, unit)
    drawn = chart(f"{layer_name(layer, layers)}, attention by {unit} apart: {caption}", lines, *axes, *SMALL)
    return f"<figure><figcaption>{layer_code(layer, layers)}<br>{caption}</figcaption>{drawn}</figure>"


def fit_in_words(found: Record, unit: str) -> str:
    """What the fitted exponential says.

    Args:
        found: with ``rate`` and ``r_squared``.
        unit: of the distance, in the plural.
    """
    rate, fit = found["rate"], found["r_squared"]
    if rate is None:
        return "no exponential fits"
    if fit < GOOD_FIT:
        return f"not exponential, R² {fit:.2f}"
    said = f"halves in {math.log(2) / rate:.3g} {unit}" if rate > 0 else f"rises, rate {rate:.2g}"
    return f"{said}, R² {fit:.2f}"


def _fitted(points: Sequence[tuple[float, float]], rate: float) -> list[tuple[float, float]]:
    """The exponential of a rate through the middle of the points, as least squares of the logarithm has it."""
    height = fmean(math.log(value) for _, value in points) + rate * fmean(distance for distance, _ in points)
    return [(distance, math.exp(height - rate * distance)) for distance, _ in points]


def _gallery(charts: Sequence[str]) -> str:
    """The first charts, and the others to unfold."""
    first, others = ("".join(part) for part in (charts[:SHOWN], charts[SHOWN:]))
    count = len(charts) - SHOWN
    more = folded(f"{count} more layer{'s' * (count > 1)}", f"<div class='charts small'>{others}</div>")
    return f"<div class='charts small'>{first}</div>{more if others else ''}"


def _legend(*entries: tuple[str, str]) -> str:
    items = "".join(f'<li><span class="key {kind}"></span>{words}</li>' for kind, words in entries)
    return f"<ul class='legend'>{items}</ul>"
