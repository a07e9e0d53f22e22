"""The table of methods: what the results come to, as JSON and as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from ...inspect.tuning import TOLERANCE
from ..compare import decibels
from ..report.journal import Record
from ..report.judging import accuracy, median_seconds
from .contenders import EQUAL, PUBLISHED, Contender
from .runs import DENSE, Results

Column = tuple[str, Callable[[Record], str]]


def summary(
    context: Record, results: Results, settled: Sequence[tuple[Contender, Record]], prompts: Sequence[str]
) -> Record:
    """All figures: settings, dense itself, a row for each contender, and every single run.

    Args:
        context: what all results depend on.
        results: of the runs so far.
        settled: contenders with their settings.
        prompts: in their order; those not yet rendered are passed over.
    """
    dense = {index: run for index in range(len(prompts)) if (run := results.get(DENSE, DENSE, index))}
    return {
        "settings": context,
        "noise_floor_db": (results.get("noise_floor", DENSE) or {}).get("psnr_db"),
        "dense": _of_dense(list(dense.values())),
        "contenders": [_row(context, results, *each, dense) for each in settled],
        "prompts": [{"index": index, "prompt": prompts[index], **_bare(run)} for index, run in dense.items()],
    }


def markdown(table: Record) -> str:
    """A heading, two tables for each group of contenders, and notes."""
    parts = [_heading(table)]
    for group, title in ((EQUAL, _equal_title(table)), (PUBLISHED, "As published: each with its own defaults")):
        rows = [row for row in table["contenders"] if row["group"] == group]
        acting = [row for row in rows if row["runs"]]
        if acting:
            parts += [f"### {title}", _table(_columns(), acting), _table(_slots(table), acting)]
        parts += [f"\\* {row['name']}: {row['note']}" for row in rows if row["note"]]
    return "\n\n".join(parts) + "\n"


def _of_dense(runs: Sequence[Record]) -> Record:
    if not runs:
        return {"runs": 0}
    seconds = median_seconds([run["sampling_seconds"] for run in runs])
    return {"runs": len(runs), "accuracy": accuracy(runs), "sampling_seconds": seconds}


def _row(
    context: Record, results: Results, contender: Contender, settled: Record, dense: Mapping[int, Record]
) -> Record:
    name, settings, refusal = contender.name, settled["settings"], settled["refusal"]
    row: Record = {
        "name": name,
        "group": contender.group,
        "method": contender.method,
        "token_order": contender.order,
        "settings": settings,
        "note": None if refusal is None else f"cannot act: {refusal}",
        "runs": 0,
    }
    found = {index: results.get("run", name, index, settings=settings) for index in dense}
    runs = {index: run for index, run in found.items() if run is not None}
    if refusal is not None or not runs:
        return row
    plans = results.get("plans", name, settings=settings) or {}
    return (
        row
        | {part: plans.get(part) for part in ("recall", "output_error", "by_layer")}
        | _figures(context, contender, list(runs.values()))
        | {"dense_accuracy": accuracy([dense[index] for index in runs])}
        | {"prompts": [{"index": index, **_bare(run)} for index, run in runs.items()]}
    )


def _figures(context: Record, contender: Contender, runs: Sequence[Record]) -> Record:
    values = [math.inf if run["psnr_db"] == "bit-equal" else run["psnr_db"] for run in runs]
    speedups = [run["dense_sampling_seconds"] / run["sampling_seconds"] for run in runs]
    sparse = [run["sparse_density"] for run in runs if run["sparse_density"] is not None]
    density = round(statistics.mean(sparse), 4) if sparse else None
    return {
        "runs": len(runs),
        "note": _note(context, contender, density),
        "density": {"sparse_calls": density, "all_calls": _mean(runs, "density")},
        "psnr_db": {"mean": decibels(statistics.mean(values)), "min": decibels(min(values))},
        "ssim": {"mean": _mean(runs, "ssim"), "min": min(run["ssim"] for run in runs)},
        "accuracy": accuracy(runs),
        "sampling_seconds": median_seconds([run["sampling_seconds"] for run in runs]),
        "speedup": {"median": round(statistics.median(speedups), 3), "min": round(min(speedups), 3)},
        "backend": runs[-1]["backend"],
        "fallbacks": {site: why for run in runs for site, why in run["fallbacks"].items()},
    }


def _note(context: Record, contender: Contender, density: float | None) -> str | None:
    target = context["target_density"]
    if density is None:
        return "no call followed a plan"
    if contender.group == EQUAL and contender.knobs and abs(density / target - 1) > TOLERANCE:
        return f"cannot come nearer to a density of {target:g} than {density:.3f}"
    return None


def _bare(run: Record) -> Record:
    return {name: value for name, value in run.items() if name not in ("kind", "name", "prompt", "settings")}


def _mean(runs: Sequence[Record], name: str) -> float:
    return round(statistics.mean(run[name] for run in runs), 4)


def _heading(table: Record) -> str:
    settings, dense = table["settings"], table["dense"]
    if not dense["runs"]:
        return f"{settings['model']}: nothing rendered yet."
    size = " x ".join(str(settings[name]) for name in ("frames", "height", "width"))
    right = dense["accuracy"]["all"]
    return (
        f"{settings['model']}, {dense['runs']} held-out prompts, {size}, {settings['steps']} steps, "
        f"{settings['dtype']}, {settings['machine']}. Dense: {right['right']} of {right['of']} prompts right in every "
        f"word, {dense['sampling_seconds']:.1f} s for the sampling loop. Dense against dense: "
        f"{_decibels(table['noise_floor_db'])}."
    )


def _equal_title(table: Record) -> str:
    return f"Equal density: {table['settings']['target_density']:g} of the pairs in sparse calls"


def _columns() -> list[Column]:
    return [
        ("method", _name),
        ("density of sparse calls", lambda row: _share(row["density"]["sparse_calls"])),
        ("of all calls", lambda row: _share(row["density"]["all_calls"])),
        ("recall", lambda row: _share(row["recall"])),
        ("error of the output", lambda row: _share(row["output_error"])),
        ("PSNR in dB (least)", lambda row: f"{row['psnr_db']['mean']} ({row['psnr_db']['min']})"),
        ("SSIM (least)", lambda row: f"{row['ssim']['mean']:.3f} ({row['ssim']['min']:.3f})"),
        ("all words right (dense)", lambda row: _right(row, "all")),
        ("speed-up of the loop", lambda row: f"{row['speedup']['median']:.2f}"),
        ("fallbacks", lambda row: str(len(row["fallbacks"]) or "-")),
    ]


def _slots(table: Record) -> list[Column]:
    def cell(slot: str) -> Callable[[Record], str]:
        return lambda row: _right(row, slot)

    names = [*(slot for slot in table["dense"]["accuracy"] if slot != "all"), "all"]
    return [("words right (dense)", _name), *((slot, cell(slot)) for slot in names)]


def _name(row: Record) -> str:
    return row["name"] + (" \\*" if row["note"] else "")


def _right(row: Record, slot: str) -> str:
    ours, dense = row["accuracy"].get(slot), row["dense_accuracy"].get(slot)
    return "-" if ours is None or dense is None else f"{ours['right']}/{ours['of']} ({dense['right']})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _decibels(value: float | str | None) -> str:
    return f"{value} dB" if isinstance(value, float) else str(value)


def _table(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    lines = [[name for name, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
