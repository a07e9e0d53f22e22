"""Command line: renders held-out prompts dense and with every attention method, and writes and prints the table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ...files import staged
from ..report.journal import Record, write_json
from ..report.settings import add_arguments, model_info, settings_from
from ..report.subsets import chosen_subsets
from .contenders import contenders
from .runs import Bench, MethodSampler, Results
from .table import markdown, summary

PROMPTS = 16  # unless told otherwise
DENSITY = 0.25


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line; returns 0, or 2 after naming what was wrong."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        table = json.loads(parsed.table.read_text()) if parsed.table else _measure(parsed)
        text = markdown(table)
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def _measure(parsed: argparse.Namespace) -> Record:
    """Settles the contenders, then renders prompt after prompt; the files are written anew after each."""
    if parsed.out is None or parsed.out.suffix != ".json":
        raise ValueError(f"--out must be a .json file; got {parsed.out}")
    if not 0 < parsed.density <= 1:
        raise ValueError(f"--density is the part of the pairs to keep, in (0, 1]; got {parsed.density}")
    everyone, chosen, info = contenders(), contenders(parsed.only), model_info(parsed.model)
    subset, *_ = chosen_subsets(info, parsed.subset, parsed.prompts)
    sampler = MethodSampler(settings_from(parsed, "dense", info))
    context = {
        **sampler.context(),
        "subset": subset.name,
        "slots": list(subset.slots),
        "target_density": parsed.density,
    }
    results = Results(parsed.out.with_suffix(".progress.jsonl"), context)
    for each in contenders(parsed.forget) if parsed.forget else ():
        results.forget(each.name)
    bench = Bench(sampler, subset, results, parsed.density)
    bench.warm_up()
    settled = bench.settle(everyone, chosen)
    acting = [each for each, found in settled if each in chosen and found["refusal"] is None]
    for index in range(len(subset.prompts)):
        bench.render(index, acting)
        table = summary(context, results, settled, [words.prompt for words in subset.prompts])
        _write(parsed.out, table)
    return table


def _write(out: Path, table: Record) -> None:
    write_json(out, table)
    with staged(out.with_suffix(".md")) as (scratch,):
        scratch.write_text(markdown(table))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.shapes.methods", description=__doc__)
    add_arguments(parser)
    parser.set_defaults(prompts=PROMPTS)
    parser.add_argument("--density", type=float, default=DENSITY, help=f"that is to be equal (default: {DENSITY})")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this contender; repeatable")
    parser.add_argument(
        "--forget", action="append", default=[], metavar="NAME", help="measure this contender anew; repeatable"
    )
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("--out", type=Path, help="JSON file to write; a Markdown table is written beside it")
    files.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
