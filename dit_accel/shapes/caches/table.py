"""The table of caches: what the results come to, as JSON and as Markdown, and who is best at a quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ..report.cells import (
    Column,
    bare,
    decibel_text,
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
from .contender import PEERS, PRESETS, TOGETHER, Contender

TITLES = {PRESETS: "Presets", PEERS: "Caches of others", TOGETHER: "Presets with sparse attention"}
BELOW_FLOOR = 3.0  # dB under the noise floor, from which on dense runs are no longer the same
GOOD_ENOUGH = 28.0  # dB, where our best is compared with the best of others
MOTION_ALARM = 0.9


def summary(
    context: Record, results: Results, settled: Sequence[tuple[Contender, Record]], prompts: Sequence[str]
) -> Record:
    """All figures: settings, dense itself, a row for each contender, every single run, and who is best.

    Args:
        context: what all results depend on.
        results: of the runs so far.
        settled: contenders with what was settled about them.
        prompts: in their order; those not yet rendered are passed over.
    """
    dense = {index: run for index in range(len(prompts)) if (run := results.get(DENSE, DENSE, index))}
    rows = [_row(results, *each, dense) for each in settled]
    return {
        "settings": context,
        "noise_floor_db": (results.get("noise_floor", DENSE) or {}).get("psnr_db"),
        "dense": dense_row(list(dense.values())),
        "contenders": rows,
        "best": best(rows, GOOD_ENOUGH),
        "prompts": [{"index": index, "prompt": prompts[index], **bare(run)} for index, run in dense.items()],
    }


def markdown(table: Record) -> str:
    """A heading, two tables for each group of contenders, notes, and who is best."""
    parts = [heading(table)]
    for group, title in TITLES.items():
        rows = [row for row in table["contenders"] if row["group"] == group]
        acting = [row for row in rows if row["runs"]]
        if acting:
            parts += [f"### {title}", markdown_table(_columns(), acting), markdown_table(slot_columns(table), acting)]
        parts += [f"\\* {row['name']}: {row['note']}" for row in rows if row["note"]]
    return "\n\n".join([*parts, *_left_on(table), *_best_lines(table["best"])]) + "\n"


def best(rows: Sequence[Record], least: float) -> Record:
    """Our fastest and the fastest of others at a mean PSNR, and our most exact one at the speed of the latter.

    Rows are compared that were rendered for equally many prompts, as many as any, and that reused something.

    Args:
        rows: of the table.
        least: mean PSNR in dB that counts as good enough.

    Returns:
        ``least_db``, ``prompts``; ``ours``, ``others`` and ``ours_at_their_speed``, each with ``name``, ``psnr_db``
        and ``speedup``, or None; with the first two ``faster`` (a ratio), with the last two ``better_db``.
    """
    most = max((row["runs"] for row in rows), default=0)
    whole = [row for row in rows if row["runs"] == most > 0 and row["computed_share"] < 1]
    ours = [row for row in whole if row["group"] == PRESETS]
    others = [row for row in whole if row["group"] == PEERS]
    mine, theirs = (_fastest([row for row in some if _decibels(row) >= least]) for some in (ours, others))
    level = _best_of([row for row in ours if theirs and _speed(row) >= _speed(theirs)])
    found: Record = {"least_db": least, "prompts": most}
    found |= {"ours": _short(mine), "others": _short(theirs), "ours_at_their_speed": _short(level)}
    if mine and theirs:
        found["faster"] = round(_speed(mine) / _speed(theirs), 3)
    if level and theirs:
        found["better_db"] = round(min(_decibels(level), 120.0) - min(_decibels(theirs), 120.0), 2)
    return found


def _fastest(rows: Sequence[Record]) -> Record | None:
    return max(rows, key=_speed, default=None)


def _best_of(rows: Sequence[Record]) -> Record | None:
    return max(rows, key=_decibels, default=None)


def _speed(row: Record) -> float:
    speed: float = row["speedup"]["median"]
    return speed


def _decibels(row: Record) -> float:
    return _level(row["psnr_db"]["mean"])


def _short(row: Record | None) -> Record | None:
    return row and {"name": row["name"], "psnr_db": row["psnr_db"]["mean"], "speedup": row["speedup"]["median"]}


def _row(results: Results, contender: Contender, settled: Record, dense: Mapping[int, Record]) -> Record:
    refusal = settled["refusal"]
    row: Record = {
        "name": contender.name,
        "group": contender.group,
        "curve": contender.curve,
        "settings": {**contender.key, **settled["found"]},
        "note": None if refusal is None else f"cannot act: {refusal}",
        "runs": 0,
    }
    found = {index: results.get("run", contender.name, index, settings=contender.key) for index in dense}
    runs = {index: run for index, run in found.items() if run is not None}
    if refusal is not None or not runs:
        return row
    return (
        row
        | _figures(list(runs.values()))
        | {"dense_accuracy": accuracy([dense[index] for index in runs])}
        | {"prompts": [{"index": index, **bare(run)} for index, run in runs.items()]}
    )


def _figures(runs: Sequence[Record]) -> Record:
    motion = [run["motion_ratio"] for run in runs if "motion_ratio" in run]
    kept = [run["kept_bytes"] for run in runs if run["kept_bytes"] is not None]
    density = [run["sparse_density"] for run in runs if run.get("sparse_density") is not None]
    share = mean_of(runs, "computed_share")
    return {
        "runs": len(runs),
        "note": "nothing was reused" if share >= 1 and not density else None,
        "computed_share": share,
        "sparse_density": round(statistics.mean(density), 4) if density else None,
        **psnr_and_time(runs),
        "motion_ratio": {"median": round(statistics.median(motion), 4), "min": min(motion)} if motion else None,
        "kept_bytes": max(kept, default=None),
    }


def _columns() -> list[Column]:
    return [
        ("cache", name_cell),
        ("computed", lambda row: share_cell(row["computed_share"])),
        ("density", lambda row: share_cell(row["sparse_density"])),
        ("PSNR in dB (least)", lambda row: f"{row['psnr_db']['mean']} ({row['psnr_db']['min']})"),
        ("SSIM (least)", lambda row: f"{row['ssim']['mean']:.3f} ({row['ssim']['min']:.3f})"),
        ("motion (least)", _motion),
        ("all words right (dense)", lambda row: right_cell(row, "all")),
        ("speed-up of the loop (least)", lambda row: f"{row['speedup']['median']:.2f} ({row['speedup']['min']:.2f})"),
        ("kept, MB", lambda row: "-" if row["kept_bytes"] is None else f"{row['kept_bytes'] / 1e6:.1f}"),
        ("prompts", lambda row: str(row["runs"])),
    ]


def _motion(row: Record) -> str:
    motion = row["motion_ratio"]
    if motion is None:
        return "-"
    alarm = " !" if motion["min"] < MOTION_ALARM else ""
    return f"{motion['median']:.2f} ({motion['min']:.2f}{alarm})"


def _left_on(table: Record) -> list[str]:
    """An alarm where the dense runs before and after some contenders differ, so that one may not have come off."""
    if table["noise_floor_db"] is None:
        return []
    least = _level(table["noise_floor_db"]) - BELOW_FLOOR
    runs = [(row["name"], run) for row in table["contenders"] for run in row.get("prompts", ())]
    names = dict.fromkeys(name for name, run in runs if _level(run["dense_again_db"]) < least)
    return [f"! Dense runs differ before and after: {'; '.join(names)}. Is one of them still on?"] if names else []


def _level(decibels: float | str) -> float:
    return math.inf if decibels == "bit-equal" else float(decibels)


def _best_lines(found: Record) -> list[str]:
    if not found["prompts"]:
        return []
    lines = [f"### At a mean PSNR of at least {found['least_db']:g} dB, {found['prompts']} prompts"]
    for who, title in (("ours", "Our fastest"), ("others", "The fastest of others")):
        one = found[who]
        lines.append(f"{title}: " + ("none." if one is None else f"{one['name']}, {_at(one)}."))
    if "faster" in found:
        lines.append(f"Ours is {found['faster']:.2f} times as fast.")
    if "better_db" in found:
        one = found["ours_at_their_speed"]
        lines.append(f"Our most exact one that is no slower: {one['name']}, {_at(one)}: {found['better_db']:+.2f} dB.")
    return lines


def _at(one: Record) -> str:
    return f"{one['speedup']:.2f} times as fast as dense, {decibel_text(one['psnr_db'])}"
