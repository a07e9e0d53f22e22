"""Renders and judges held-out prompts, and writes what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ...files import staged
from ...journal import Journal
from ..world import SceneWords
from .caption import seen_instead
from .grid import Cell, draw_grid, middle_frame
from .judging import accuracy, judged, median_seconds
from .records import Record, write_json
from .sampling import Sampler, tell
from .settings import Settings
from .subsets import Subset

GRID_CELLS = 16  # in all
HEADINGS = {"basic": "one plain object", "single": "one object", "pair": "two objects"}


def build_report(settings: Settings, subsets: Sequence[Subset], out: Path) -> Record:
    """Renders and judges the prompts of the subsets, and writes ``shapes.json`` and ``grid.png`` into ``out``.

    Finished prompts are kept in ``out / 'progress'``; a later call with the same settings goes on from there.

    Returns:
        The content of ``shapes.json``: settings, seconds of loading; for each subset accuracy, seconds and prompts.

    Raises:
        ValueError: if there is no such model or ``out`` holds the progress of other settings.
        FileNotFoundError: if the model's folder holds no pipeline.
    """
    sampler = Sampler(settings)
    report: Record = {
        "settings": sampler.context(),
        "load_seconds": round(sampler.load_seconds, 3),
        "subsets": {subset.name: _judge_subset(sampler, subset, out) for subset in subsets},
    }
    write_json(out / "shapes.json", report)
    _write_grid(out, subsets, report)
    return report


def _judge_subset(sampler: Sampler, subset: Subset, out: Path) -> Record:
    context = {**sampler.context(), "slots": list(subset.slots)}
    journal, count = Journal(out / "progress" / f"{subset.name}.jsonl", context), len(subset.prompts)
    for index, words in enumerate(subset.prompts):
        if index not in journal.records:
            journal.add(index, _render(sampler, subset, index, _frame_file(out, subset, index)))
        tell(_line(f"{subset.name} {index + 1}/{count}", words, journal.records[index]))
    results = [journal.records[index] for index in range(count)]
    return {
        "slots": list(subset.slots),
        "accuracy": accuracy(results),
        "seconds": {
            "median": median_seconds([result["seconds"] for result in results]),
            "median_sampling": median_seconds([result["sampling_seconds"] for result in results]),
            "total": round(sum(result["seconds"] for result in results), 1),
        },
        "prompts": results,
    }


def _render(sampler: Sampler, subset: Subset, index: int, frame_file: Path) -> Record:
    words = subset.prompts[index]
    sample = sampler.sample(words.prompt, index, sampler.settings.attention)
    if index < GRID_CELLS:
        frame_file.parent.mkdir(parents=True, exist_ok=True)
        with staged(frame_file) as (scratch,):
            middle_frame(sample.video).save(scratch)
    return {
        "prompt": words.prompt,
        "seed": sampler.settings.seed + index,
        **judged(sample.video, words, subset.slots),
        "seconds": round(sample.seconds, 3),
        "sampling_seconds": round(sample.sampling_seconds, 3),
        "attention": sample.attention,
    }


def _write_grid(out: Path, subsets: Sequence[Subset], report: Record) -> None:
    parts = []
    for subset in subsets:
        results = report["subsets"][subset.name]["prompts"][: GRID_CELLS // len(subsets)]
        frames = [Image.open(_frame_file(out, subset, index)) for index in range(len(results))]
        cells = [Cell(*each) for each in zip(frames, subset.prompts, results, strict=False)]
        parts.append((HEADINGS[subset.name], cells))
    with staged(out / "grid.png") as (scratch,):
        draw_grid(parts).save(scratch)


def _frame_file(out: Path, subset: Subset, index: int) -> Path:
    return out / "progress" / f"{subset.name}-{index:02d}.png"


def _line(place: str, words: SceneWords, result: Record) -> str:
    instead = seen_instead(words, result)
    verdict = "right" if result["all"] else "wrong, seen: " + ", ".join(instead)
    return f"[{place}] {words.prompt}: {verdict} ({result['seconds']:.1f} s)"
