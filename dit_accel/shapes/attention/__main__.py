"""Command line: renders held-out prompts, measures the attention of every layer, writes JSON and prints tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...inspect.recorder import AttentionStatisticsRecorder, Record, spread
from .table import attention_tables


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line; returns 0, or 2 after naming what was wrong."""
    from ..report.records import write_json
    from ..report.settings import add_arguments

    parser = argparse.ArgumentParser(prog="python -m dit_accel.shapes.attention", description=__doc__)
    add_arguments(parser)
    parser.set_defaults(prompts=2)
    parser.add_argument("--block", type=int, default=64, help="tokens per block (default: 64)")
    parser.add_argument(
        "--samples", type=int, default=4, help="sampling steps that are recorded, spread evenly (default: 4)"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.out.suffix != ".json":
            raise ValueError(f"--out must be a .json file; got {parsed.out}")
        report = _measure(parsed, AttentionStatisticsRecorder(parsed.block, samples=parsed.samples))
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    write_json(parsed.out, report)
    print(attention_tables(report), end="")
    return 0


def _measure(parsed: argparse.Namespace, recorder: AttentionStatisticsRecorder) -> Record:
    import dit_accel

    from ..report.sampling import Sampler, tell
    from ..report.settings import model_info, settings_from
    from ..report.subsets import chosen_subsets

    info = model_info(parsed.model)
    subset, *_ = chosen_subsets(info, parsed.subset, parsed.prompts)
    settings = settings_from(parsed, "dense", info)
    sampler = Sampler(settings)
    prompts = [words.prompt for words in subset.prompts]
    with dit_accel.accelerate(sampler.pipe, controls=[recorder]):
        for index, prompt in enumerate(prompts):
            seconds = sampler.sample(prompt, index, "dense").seconds
            tell(f"[{index + 1}/{len(prompts)}] {prompt}: {seconds:.1f} s")
    return {
        "settings": sampler.context(),
        "block": recorder.block,
        "recorded_steps": spread(settings.steps, parsed.samples),
        "prompts": prompts,
        "layers": recorder.by_layer(),
    }


if __name__ == "__main__":
    sys.exit(main())
