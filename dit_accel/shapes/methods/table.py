"""The table of methods: what the results come to, as JSON and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ...inspect.tuning import TOLERANCE
from ..report.cells import (
    Column,
    bare,
    dense_row,
    heading,
    markdown_table,
    mean_of,
    name_cell,
    psnr_and_time,
    right_cell,
    share_cell,
    slot_columns,
)
from ..report.judging import accuracy
from ..report.records import Record
from ..report.results import DENSE, Results
from .contenders import EQUAL, PUBLISHED, Contender


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
        "dense": dense_row(list(dense.values())),
        "contenders": [_row(context, results, *each, dense) for each in settled],
        "prompts": [{"index": index, "prompt": prompts[index], **bare(run)} for index, run in dense.items()],
    }


def markdown(table: Record) -> str:
    """A heading, two tables for each group of contenders, and notes."""
    parts = [heading(table)]
    for group, title in ((EQUAL, _equal_title(table)), (PUBLISHED, "As published: each with its own defaults")):
        rows = [row for row in table["contenders"] if row["group"] == group]
        acting = [row for row in rows if row["runs"]]
        if acting:
            parts += [f"### {title}", markdown_table(_columns(), acting), markdown_table(slot_columns(table), acting)]
        parts += [f"\\* {row['name']}: {row['note']}" for row in rows if row["note"]]
    return "\n\n".join(parts) + "\n"


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
        | {"prompts": [{"index": index, **bare(run)} for index, run in runs.items()]}
    )


def _figures(context: Record, contender: Contender, runs: Sequence[Record]) -> Record:
    sparse = [run["sparse_density"] for run in runs if run["sparse_density"] is not None]
    density = round(statistics.mean(sparse), 4) if sparse else None
    return {
        "runs": len(runs),
        "note": _note(context, contender, density),
        "density": {"sparse_calls": density, "all_calls": mean_of(runs, "density")},
        **psnr_and_time(runs),
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


def _equal_title(table: Record) -> str:
    return f"Equal density: {table['settings']['target_density']:g} of the pairs in sparse calls"


def _columns() -> list[Column]:
    return [
        ("method", name_cell),
        ("density of sparse calls", lambda row: share_cell(row["density"]["sparse_calls"])),
        ("of all calls", lambda row: share_cell(row["density"]["all_calls"])),
        ("recall", lambda row: share_cell(row["recall"])),
        ("error of the output", lambda row: share_cell(row["output_error"])),
        ("PSNR in dB (least)", lambda row: f"{row['psnr_db']['mean']} ({row['psnr_db']['min']})"),
        ("SSIM (least)", lambda row: f"{row['ssim']['mean']:.3f} ({row['ssim']['min']:.3f})"),
        ("all words right (dense)", lambda row: right_cell(row, "all")),
        ("speed-up of the loop", lambda row: f"{row['speedup']['median']:.2f}"),
        ("fallbacks", lambda row: str(len(row["fallbacks"]) or "-")),
        ("prompts", lambda row: str(row["runs"])),
    ]
