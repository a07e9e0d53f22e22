"""Radial against dense attention, same prompts and noise: ``python -m dit_accel.shapes.compare --out FILE``."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

from ..metrics import psnr
from .journal import Journal, Record, write_json
from .sampling import Sample, Sampler, accuracy, judged, median_seconds, say
from .settings import Settings, add_arguments, prompts, settings_from
from .world import Attributes

METHOD = "radial"


def compare(settings: Settings, count: int, out: Path) -> Record:
    """Renders the first held-out prompts dense and sparse, in turns, and writes the comparison to ``out``.

    Each prompt starts from the same noise both times; every other prompt runs sparse first, so that neither way gains
    from its place. The first prompt runs dense once more, which shows how far two equal runs differ.
    Finished prompts are kept beside ``out``; a later call with the same settings goes on from there.

    Returns:
        The content of the file.

    Raises:
        ValueError: if ``count`` is out of range or progress of other settings lies beside ``out``.
        FileNotFoundError: if the model does not exist.
    """
    chosen, sampler = prompts(count), Sampler(settings)
    journal = Journal(out.with_suffix(".progress.jsonl"), sampler.context())
    for index, attributes in enumerate(chosen):
        if index not in journal.records:
            journal.add(index, _pair(sampler, attributes, index))
        say(_line(index, count, attributes, journal.records[index]))
    comparison = _summary(journal.context, [journal.records[index] for index in range(count)])
    write_json(out, comparison)
    return comparison


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 after naming what was wrong."""
    parser = argparse.ArgumentParser(prog="python -m dit_accel.shapes.compare", description=__doc__)
    add_arguments(parser)
    parser.set_defaults(prompts=16)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.out.suffix != ".json":
            raise ValueError(f"--out must be a .json file; got {parsed.out}")
        comparison = compare(settings_from(parsed, METHOD), parsed.prompts, parsed.out)
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for way in ("dense", METHOD):
        right = ", ".join(f"{slot} {n['right']}/{n['of']}" for slot, n in comparison["accuracy"][way].items())
        print(f"{way}: {right}; {comparison['sampling_seconds'][way]} s a clip")
    for site, why in comparison["fallbacks"].items():
        print(f"FALLBACK {site}: {why}")
    figures = {**comparison["psnr_db"], "dense again": comparison["noise_floor_db"]}
    print("PSNR in dB: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
    return 0


def _pair(sampler: Sampler, attributes: Attributes, index: int) -> Record:
    def run(way: str) -> Sample:
        return sampler.sample(attributes.prompt, index, way)

    extra = run("dense") if index == 0 else None  # also takes the slow first call away from the timed ones
    order = ("dense", METHOD) if index % 2 == 0 else (METHOD, "dense")
    samples = {way: run(way) for way in order}
    dense, sparse = samples["dense"], samples[METHOD]
    record: Record = {
        "prompt": attributes.prompt,
        "seed": sampler.settings.seed + index,
        "first": order[0],
        "psnr_db": decibels(psnr(sparse.video, dense.video)),
        "attention": sparse.attention,
    }
    for way, sample in samples.items():
        seconds = {"seconds": round(sample.seconds, 3), "sampling_seconds": round(sample.sampling_seconds, 3)}
        record[way] = {**judged(sample.video, attributes), **seconds}
    if extra is not None:
        record["noise_floor_db"] = decibels(psnr(extra.video, dense.video))
    return record


def decibels(value: float) -> float | str:
    """PSNR as a JSON value; ``"bit-equal"`` stands for infinity, which JSON lacks."""
    return "bit-equal" if math.isinf(value) else round(value, 2)


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
        "sampling_seconds": {way: median_seconds(values) for way, values in seconds.items()},
        "speedup": {"median": round(statistics.median(ratios), 3), "min": round(min(ratios), 3)},
        "density": statistics.mean(result["attention"]["density"] for result in results),
        "fallbacks": fallbacks,
        "prompts": results,
    }


def _line(index: int, count: int, attributes: Attributes, result: Record) -> str:
    dense, sparse = (f"{sum(result[way]['right'].values())}/4 right" for way in ("dense", METHOD))
    times = f"{result['dense']['sampling_seconds']:.1f} s, {METHOD} {result[METHOD]['sampling_seconds']:.1f} s"
    return (
        f"[{index + 1}/{count}] {attributes.prompt}: dense {dense}, {METHOD} {sparse},"
        f" PSNR {result['psnr_db']}, dense {times}"
    )


if __name__ == "__main__":
    sys.exit(main())
