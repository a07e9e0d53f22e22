"""Command line: renders held-out prompts dense and with every attention method, and writes and prints the table."""

from __future__ import annotations

import argparse
import sys

from ..report.records import Record
from ..report.settings import add_arguments, model_info, settings_from
from ..report.subsets import chosen_subsets
from ..report.tables import add_table_arguments, checked_out, opened, table_main, write_table
from .contenders import contenders
from .runs import MethodBench, MethodSampler
from .table import markdown, summary

PROMPTS = 16  # unless told otherwise
DENSITY = 0.25


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line; returns 0, or 2 after naming what was wrong."""
    return table_main(_parser(), arguments, _measure, markdown)


def _measure(parsed: argparse.Namespace) -> Record:
    """Settles the contenders, then renders prompt after prompt; the files are written anew after each."""
    out = checked_out(parsed.out)
    if not 0 < parsed.density <= 1:
        raise ValueError(f"--density is the part of the pairs to keep, in (0, 1]; got {parsed.density}")
    everyone, chosen, info = contenders(), contenders(parsed.only), model_info(parsed.model)
    subset, *_ = chosen_subsets(info, parsed.subset, parsed.prompts)
    sampler = MethodSampler(settings_from(parsed, "dense", info))
    context, results = opened(out, sampler, subset, target_density=parsed.density)
    for each in contenders(parsed.forget) if parsed.forget else ():
        results.forget(each.name)
    bench = MethodBench(sampler, subset, results, parsed.density)
    settled = bench.settle(everyone, chosen)
    acting = [each for each, found in settled if each in chosen and found["refusal"] is None]
    for index in range(len(subset.prompts)):
        bench.render(index, acting)
        table = summary(context, results, settled, [words.prompt for words in subset.prompts])
        write_table(out, table, markdown(table))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.shapes.methods", description=__doc__)
    add_arguments(parser)
    parser.set_defaults(prompts=PROMPTS)
    parser.add_argument("--density", type=float, default=DENSITY, help=f"that is to be equal (default: {DENSITY})")
    add_table_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
