"""Command line: renders and judges held-out prompts of a shapes model, and writes ``shapes.json`` and ``grid.png``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .build import build_report
from .records import Record
from .settings import add_arguments, model_info, settings_from
from .subsets import chosen_subsets


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line; returns 0, or 2 after naming what was wrong."""
    parser = argparse.ArgumentParser(prog="python -m dit_accel.shapes.report", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--attention", choices=("dense", "radial"), default="dense")
    parser.add_argument("--out", type=Path, required=True, help="folder of shapes.json and grid.png")
    parsed = parser.parse_args(arguments)
    try:
        info = model_info(parsed.model)
        subsets = chosen_subsets(info, parsed.subset, parsed.prompts)
        report = build_report(settings_from(parsed, parsed.attention, info), subsets, parsed.out)
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    _print_accuracy(report)
    return 0


def _print_accuracy(report: Record) -> None:
    print(f"loaded in {report['load_seconds']:.2f} s")
    for name, section in report["subsets"].items():
        print(f"{name}, {len(section['prompts'])} prompts:")
        for slot, count in section["accuracy"].items():
            print(f"  {slot:<11} {count['right']}/{count['of']} ({count['share']:.1%})")


if __name__ == "__main__":
    sys.exit(main())
