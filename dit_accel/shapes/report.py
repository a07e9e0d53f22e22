"""Judges a shapes model on prompts it never saw: ``python -m dit_accel.shapes.report --out docs/shapes``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from ..files import staged
from .grid import draw_grid, middle_frame
from .journal import Journal, Record, write_json
from .sampling import Sampler, accuracy, judged, median_seconds, say
from .settings import Settings, add_arguments, prompts, settings_from
from .world import Attributes

GRID_CELLS = 16


def build_report(settings: Settings, count: int, out: Path) -> Record:
    """Renders and judges the first held-out prompts, and writes ``shapes.json`` and ``grid.png`` into ``out``.

    Finished prompts are kept in ``out / 'progress'``; a later call with the same settings goes on from there.

    Returns:
        The content of ``shapes.json``.

    Raises:
        ValueError: if ``count`` is out of range or ``out`` holds the progress of other settings.
        FileNotFoundError: if the model does not exist.
    """
    chosen, sampler = prompts(count), Sampler(settings)
    journal = Journal(out / "progress" / "results.jsonl", sampler.context())
    for index, attributes in enumerate(chosen):
        if index not in journal.records:
            journal.add(index, _render(sampler, attributes, index, _frame_file(out, index)))
        say(_line(index, count, attributes, journal.records[index]))
    results = [journal.records[index] for index in range(count)]
    report = _summary(journal.context, results)
    write_json(out / "shapes.json", report)
    _write_grid(out, chosen[:GRID_CELLS], results)
    return report


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 after naming what was wrong."""
    parser = argparse.ArgumentParser(prog="python -m dit_accel.shapes.report", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--attention", choices=("dense", "radial"), default="dense")
    parser.add_argument("--out", type=Path, required=True, help="folder of shapes.json and grid.png")
    parsed = parser.parse_args(arguments)
    try:
        report = build_report(settings_from(parsed, parsed.attention), parsed.prompts, parsed.out)
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for slot, count in report["accuracy"].items():
        print(f"{slot:<11} {count['right']}/{count['of']}")
    return 0


def _render(sampler: Sampler, attributes: Attributes, index: int, frame_file: Path) -> Record:
    sample = sampler.sample(attributes.prompt, index, sampler.settings.attention)
    if index < GRID_CELLS:
        frame_file.parent.mkdir(parents=True, exist_ok=True)
        with staged(frame_file) as (scratch,):
            middle_frame(sample.video).save(scratch)
    return {
        "prompt": attributes.prompt,
        "seed": sampler.settings.seed + index,
        **judged(sample.video, attributes),
        "seconds": round(sample.seconds, 3),
        "sampling_seconds": round(sample.sampling_seconds, 3),
        "attention": sample.attention,
    }


def _summary(context: Record, results: list[Record]) -> Record:
    return {
        "settings": context,
        "accuracy": accuracy(results),
        "seconds": {
            "median": median_seconds([result["seconds"] for result in results]),
            "median_sampling": median_seconds([result["sampling_seconds"] for result in results]),
            "total": round(sum(result["seconds"] for result in results), 1),
        },
        "prompts": results,
    }


def _write_grid(out: Path, chosen: list[Attributes], results: list[Record]) -> None:
    frames = [Image.open(_frame_file(out, index)) for index in range(len(chosen))]
    with staged(out / "grid.png") as (scratch,):
        draw_grid(list(zip(frames, chosen, results[:GRID_CELLS], strict=True))).save(scratch)


def _frame_file(out: Path, index: int) -> Path:
    return out / "progress" / f"frame-{index:02d}.png"


def _line(index: int, count: int, attributes: Attributes, result: Record) -> str:
    wrong = [f"{slot} {result['seen'][slot]}" for slot, right in result["right"].items() if not right]
    verdict = "right" if not wrong else "wrong: " + ", ".join(wrong)
    return f"[{index + 1}/{count}] {attributes.prompt}: {verdict} ({result['seconds']:.1f} s)"


if __name__ == "__main__":
    sys.exit(main())
