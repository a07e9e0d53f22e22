"""Radial against dense attention, same prompts and noise: ``python -m dit_accel.shapes.compare --out FILE``."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

from ..journal import Journal
from ..metrics import noise_floor, psnr
from .report.judging import accuracy, decibels, judged, median_seconds, temporal
from .report.records import Record, write_json
from .report.sampling import Sample, Sampler, tell
from .report.settings import Settings, add_arguments, model_info, settings_from
from .report.subsets import Subset, chosen_subsets
from .world import SceneWords

METHOD = "radial"
PROMPTS = 16  # unless told otherwise


def compare(settings: Settings, subset: Subset, out: Path) -> Record:
    """Renders the prompts of a subset dense and sparse, in turns, and writes the comparison to ``out``.

    Each prompt starts from the same noise both times; every other prompt runs sparse first, so that neither way gains
    from its place. The first prompt runs dense once more, which shows how far two equal runs differ.
    Finished prompts are kept beside ``out``; a later call with the same settings goes on from there.

    Returns:
        The content of the file.

    Raises:
        ValueError: if there is no such model or progress of other settings lies beside ``out``.
        FileNotFoundError: if the model's folder holds no pipeline.
    """
    sampler, count = Sampler(settings), len(subset.prompts)
    context = {**sampler.context(), "subset": subset.name, "slots": list(subset.slots)}
    journal = Journal(out.with_suffix(".progress.jsonl"), context)
    missing = [index for index in range(count) if index not in journal.records]
    if missing and missing[0] > 0:
        sampler.sample(subset.prompts[0].prompt, 0, "dense")  # the slow first call; prompt 0 has one of its own
    for index, words in enumerate(subset.prompts):
        if index not in journal.records:
            journal.add(index, _pair(sampler, subset, index))
        tell(_line(f"{index + 1}/{count}", words, journal.records[index]))
    comparison = _summary(context, [journal.records[index] for index in range(count)])
    write_json(out, comparison)
    return comparison


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 after naming what was wrong."""
    parser = argparse.ArgumentParser(prog="python -m dit_accel.shapes.compare", description=__doc__)
    add_arguments(parser)
    parser.set_defaults(prompts=PROMPTS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.out.suffix != ".json":
            raise ValueError(f"--out must be a .json file; got {parsed.out}")
        info = model_info(parsed.model)
        subset, *_ = chosen_subsets(info, parsed.subset, parsed.prompts)
        comparison = compare(settings_from(parsed, METHOD, info), subset, parsed.out)
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    _print_comparison(comparison)
    return 0


def _print_comparison(comparison: Record) -> None:
    for way in ("dense", METHOD):
        right = ", ".join(f"{slot} {n['right']}/{n['of']}" for slot, n in comparison["accuracy"][way].items())
        print(f"{way}: {right}; {comparison['sampling_seconds'][way]} s a sample")
    for site, why in comparison["fallbacks"].items():
        print(f"FALLBACK {site}: {why}")
    figures = {**comparison["psnr_db"], "dense again": comparison["noise_floor_db"]}
    print("PSNR in dB: " + ", ".join(f"{name} {value}" for name, value in figures.items()))


def _pair(sampler: Sampler, subset: Subset, index: int) -> Record:
    words = subset.prompts[index]

    def run(way: str) -> Sample:
        return sampler.sample(words.prompt, index, way)

    extra = run("dense") if index == 0 else None  # also takes the slow first call away from the timed ones
    order = ("dense", METHOD) if index % 2 == 0 else (METHOD, "dense")
    samples = {way: run(way) for way in order}
    dense, sparse = samples["dense"], samples[METHOD]
    record: Record = {
        "prompt": words.prompt,
        "seed": sampler.settings.seed + index,
        "first": order[0],
        "psnr_db": decibels(psnr(sparse.video, dense.video)),
        **temporal(sparse.video, dense.video),
        "attention": sparse.attention,
    }
    for way, sample in samples.items():
        seconds = {"seconds": round(sample.seconds, 3), "sampling_seconds": round(sample.sampling_seconds, 3)}
        record[way] = {**judged(sample.video, words, subset.slots), **seconds}
    if extra is not None:
        record["noise_floor_db"] = decibels(noise_floor([extra.video, dense.video]))
    return record


def _summary(context: Record, results: list[Record]) -> Record:
    seconds = {way: [result[way]["sampling_seconds"] for result in results] for way in ("dense", METHOD)}
    ratios = [dense / sparse for dense, sparse in zip(seconds["dense"], seconds[METHOD], strict=True)]
    values = [math.inf if result["psnr_db"] == "bit-equal" else result["psnr_db"] for result in results]
    fallbacks = {site: why for result in results for site, why in result["attention"]["fallbacks"].items()}
    return {
        "settings": context,
        "accuracy": {way: accuracy([result[way] for result in results]) for way in ("dense", METHOD)},
        "psnr_db": {"median": decibels(statistics.median(values)), "min": decibels(min(values))},
        "noise_floor_db": results[0]["noise_floor_db"],
        **{name: spread for name in ("motion_ratio", "flicker") if (spread := _spread(name, results))},
        "sampling_seconds": {way: median_seconds(values) for way, values in seconds.items()},
        "speedup": {"median": round(statistics.median(ratios), 3), "min": round(min(ratios), 3)},
        "density": statistics.mean(result["attention"]["density"] for result in results),
        "fallbacks": fallbacks,
        "prompts": results,
    }


def _spread(name: str, results: list[Record]) -> Record:
    values = [result[name] for result in results if name in result]
    return {"median": round(statistics.median(values), 5), "min": min(values), "max": max(values)} if values else {}


def _line(place: str, words: SceneWords, result: Record) -> str:
    slots = len(result["dense"]["right"])
    dense, sparse = (f"{sum(result[way]['right'].values())}/{slots} right" for way in ("dense", METHOD))
    times = f"{result['dense']['sampling_seconds']:.1f} s, {METHOD} {result[METHOD]['sampling_seconds']:.1f} s"
    return f"[{place}] {words.prompt}: dense {dense}, {METHOD} {sparse}, PSNR {result['psnr_db']}, dense {times}"


if __name__ == "__main__":
    sys.exit(main())
