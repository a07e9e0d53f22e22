"""What follows from the figures: which method suits the model, which layers are hard, and settings to try."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from statistics import fmean, median
from typing import Any

from .inspection import is_fair
from .methods import Candidate
from .recorder import Record

HARD_RATIO, HARD_ERROR = 2.0, 0.1  # a hard layer has twice the usual error, and a tenth of its output at least
LEAST, MOST = 0.25, 4.0  # factors on budgets that are suggested
NOTHING = 1e-9  # a mean density below which a layer was given nothing

Curve = tuple[Sequence[float], Sequence[float]]  # densities, and the recall at each


def advise(layers: Sequence[Record], candidates: Sequence[Candidate]) -> Record:
    """Draws conclusions.

    Args:
        layers: from :meth:`.InspectionRecorder.by_layer`.
        candidates: the methods that were compared.

    Returns:
        ``methods``: by method, means over all heads of ``error``, ``recall`` and ``density``, ``heads_won``, on how
        many ``layers`` it acted, and whether it was ``fair``: on all layers and nowhere much denser than asked for.
        ``method``: the fair one of the smallest mean error, None if there is none. ``hard_layers``: indices of layers
        whose error under it is above a tenth, and twice the median over layers. ``error_by_layer``: by index.
        ``suggestion``: settings for that method; None without one.
    """
    methods = {candidate.name: _overall(candidate, layers) for candidate in candidates}
    fair = [name for name, found in methods.items() if found["fair"]]
    if not fair:
        nothing: Record = {"method": None, "hard_layers": [], "error_by_layer": {}, "suggestion": None}
        return {"methods": methods, **nothing}
    name = min(fair, key=lambda method: methods[method]["error"])
    errors = error_by_layer(layers, name)
    hard = hard_layers(errors)
    return {
        "methods": methods,
        "method": name,
        "hard_layers": hard,
        "error_by_layer": {str(layer): round(error, 4) for layer, error in errors.items()},
        "suggestion": _suggestion(next(c for c in candidates if c.name == name), layers, hard),
    }


def error_by_layer(layers: Sequence[Record], method: str) -> dict[int, float]:
    """The mean error of a method over the heads of each layer index; experts and kinds of sites share indices."""
    by_index: dict[int, list[float]] = {}
    for layer in layers:
        by_index.setdefault(layer["layer"], []).extend(layer["methods"][method]["error"])
    return {index: fmean(errors) for index, errors in sorted(by_index.items())}


def hard_layers(errors: dict[int, float]) -> list[int]:
    """Layers whose error stays high where that of others does not."""
    bound = max(HARD_ERROR, HARD_RATIO * median(errors.values()))
    return [layer for layer, error in errors.items() if error > bound]


def best_densities(curves: Sequence[Curve], density: float) -> list[float]:
    """The densities of heads, of a given mean, that keep the most attention in total.

    Recall curves rise ever more slowly, so the steepest pieces of all of them are taken first.

    Args:
        curves: for each head, densities and the recall at each; straight lines between them and from 0 to 1.
        density: the mean, in (0, 1].
    """
    pieces = []
    for head, (densities, recall) in enumerate(curves):
        points = [(0.0, 0.0), *sorted(zip(densities, recall, strict=True)), (1.0, 1.0)]
        for (low, under), (high, over) in pairwise(points):
            if high > low:
                pieces.append(((over - under) / (high - low), head, high - low))
    found, left = [0.0] * len(curves), density * len(curves)
    for _, group in groupby(sorted(pieces, key=_steepness), key=_steepness):  # pieces alike get alike parts
        alike = list(group)
        part = min(1.0, left / sum(length for _, _, length in alike))
        for _, head, length in alike:
            found[head] += part * length
            left -= part * length
    return found


def _steepness(piece: tuple[float, int, float]) -> float:
    return -round(piece[0], 6)


def _overall(candidate: Candidate, layers: Sequence[Record]) -> Record:
    name = candidate.name
    acted = [layer for layer in layers if name in layer["methods"]]
    figures: Record = {}
    for figure in ("error", "recall", "density"):
        values = [value for layer in acted for value in layer["methods"][name][figure]]
        figures[figure] = round(fmean(values), 4) if values else None
    fair = len(acted) == len(layers) and all(
        is_fair(layer["methods"][name]["density"], candidate.density) for layer in acted
    )
    won = sum(best == name for layer in layers for best in layer["best"])
    return {**figures, "heads_won": won, "layers": len(acted), "fair": fair}


def _suggestion(candidate: Candidate, layers: Sequence[Record], hard: Sequence[int]) -> Record:
    """The method's settings and a schedule, as arguments of ``accelerate``."""
    settings = candidate.amount_found()
    schedule: dict[str, Any] = {"dense_layers": list(hard)} if hard else {}
    if candidate.follows_budgets():
        wanted = _wanted(layers, hard, candidate.density)
        if wanted:
            schedule |= _layer_budget(wanted)
        if wanted and candidate.follows_head_budgets():
            schedule |= _head_budget(wanted)
    return {"attention": candidate.name, **settings, **({"schedule": schedule} if schedule else {})}


def _wanted(layers: Sequence[Record], hard: Sequence[int], density: float) -> dict[int, list[list[float]]]:
    """By layer that stays sparse, for each of its sites, the best densities of its heads."""
    places, curves = [], []
    for layer in layers:
        recall = next(iter(layer["recall"].values()))  # for the smallest blocks
        if recall is not None and layer["layer"] not in hard:
            places.append((layer["layer"], layer["heads"]))
            curves += [([float(text) for text in recall], row) for row in zip(*recall.values(), strict=True)]
    densities = iter(best_densities(curves, density))
    found: dict[int, list[list[float]]] = {}
    for index, heads in places:
        found.setdefault(index, []).append([next(densities) for _ in range(heads)])
    return found


def _layer_budget(wanted: dict[int, list[list[float]]]) -> Record:
    means = {layer: fmean(fmean(heads) for heads in sites) for layer, sites in wanted.items()}
    return {"layer_budget": {layer: _factor(mean / fmean(means.values())) for layer, mean in means.items()}}


def _head_budget(wanted: dict[int, list[list[float]]]) -> Record:
    """Sites of one layer index, such as those of two experts, share it, where they have as many heads."""
    if any(len({len(heads) for heads in sites}) > 1 for sites in wanted.values()):
        return {}
    rows = {layer: [fmean(column) for column in zip(*sites, strict=True)] for layer, sites in wanted.items()}
    return {"head_budget": {layer: _factors(row) for layer, row in rows.items()}}


def _factors(row: Sequence[float]) -> list[float]:
    """Of heads, over their mean; 1 for each where the layer was given nothing, which says nothing about its heads."""
    mean = fmean(row)
    return [1.0 if mean < NOTHING else _factor(head / mean) for head in row]


def _factor(ratio: float) -> float:
    return round(min(MOST, max(LEAST, ratio)), 2)
