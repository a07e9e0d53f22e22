"""What tables of contenders beside dense are made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from .judging import accuracy, decibels, median_seconds
from .records import Record

Column = tuple[str, Callable[[Record], str]]


def dense_row(runs: Sequence[Record]) -> Record:
    """Accuracy and time of the dense runs."""
    if not runs:
        return {"runs": 0}
    seconds = median_seconds([run["sampling_seconds"] for run in runs])
    return {"runs": len(runs), "accuracy": accuracy(runs), "sampling_seconds": seconds}


def bare(run: Record) -> Record:
    """A result without what only tells it apart."""
    return {name: value for name, value in run.items() if name not in ("kind", "name", "prompt", "settings")}


def mean_of(runs: Sequence[Record], name: str) -> float:
    """Mean of an entry over runs."""
    return round(statistics.mean(run[name] for run in runs), 4)


def slot_columns(table: Record) -> list[Column]:
    """A column for each slot: words right, those of dense in brackets."""

    def cell(slot: str) -> Callable[[Record], str]:
        return lambda row: right_cell(row, slot)

    names = [*(slot for slot in table["dense"]["accuracy"] if slot != "all"), "all"]
    return [("words right (dense)", name_cell), *((slot, cell(slot)) for slot in names)]


def name_cell(row: Record) -> str:
    """Name of a row, marked if there is a note on it."""
    return row["name"] + (" \\*" if row["note"] else "")


def right_cell(row: Record, slot: str) -> str:
    """Words right of how many, those of dense in brackets."""
    ours, dense = row["accuracy"].get(slot), row["dense_accuracy"].get(slot)
    return "-" if ours is None or dense is None else f"{ours['right']}/{ours['of']} ({dense['right']})"


def share_cell(value: float | None) -> str:
    """A share to three digits; a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def decibel_text(value: float | str | None) -> str:
    """A noise floor in words."""
    return f"{value} dB" if isinstance(value, float) else str(value)


def markdown_table(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    """A Markdown table."""
    lines = [[name for name, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def psnr_and_time(runs: Sequence[Record]) -> Record:
    """Figures that every row has: likeness to dense, words right, and speed-up against the dense run beside it.

    The mean PSNR is that of the prompts that differ: infinity in some of them would hide how far the others are.
    """
    values = [run["psnr_db"] for run in runs]
    differing = [value for value in values if value != "bit-equal"] or [math.inf]
    speedups = [run["dense_sampling_seconds"] / run["sampling_seconds"] for run in runs]
    return {
        "psnr_db": {
            "mean": decibels(statistics.mean(differing)),
            "min": decibels(min(differing)),
            "bit_equal": values.count("bit-equal"),
        },
        "ssim": {"mean": mean_of(runs, "ssim"), "min": min(run["ssim"] for run in runs)},
        "accuracy": accuracy(runs),
        "sampling_seconds": median_seconds([run["sampling_seconds"] for run in runs]),
        "speedup": {"median": round(statistics.median(speedups), 3), "min": round(min(speedups), 3)},
    }


def heading(table: Record) -> str:
    """Model, sizes, machine, dense itself and the noise floor."""
    settings, dense = table["settings"], table["dense"]
    if not dense["runs"]:
        return f"{settings['model']}: nothing rendered yet."
    size = " x ".join(str(settings[name]) for name in ("frames", "height", "width"))
    right = dense["accuracy"]["all"]
    return (
        f"{settings['model']}, {dense['runs']} held-out prompts, {size}, {settings['steps']} steps, "
        f"{settings['dtype']}, {settings['machine']}. Dense: {right['right']} of {right['of']} prompts right in every "
        f"word, {dense['sampling_seconds']:.1f} s for the sampling loop. Dense against dense: "
        f"{decibel_text(table['noise_floor_db'])}."
    )
