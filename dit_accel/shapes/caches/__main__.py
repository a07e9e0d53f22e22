"""Command line: renders held-out prompts dense and with every cache, and writes and prints the table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...files import staged
from ..report.records import Record
from ..report.settings import add_arguments, model_info, settings_from
from ..report.subsets import chosen_subsets
from ..report.tables import add_table_arguments, checked_out, opened, table_main, write_table
from . import targets
from .contender import Contender
from .contenders import contenders
from .figure import caches_figure, targets_figure
from .peers import peer_versions
from .runs import CacheBench, CacheSampler
from .table import markdown, summary
from .targets import target_contenders

PROMPTS, EVERY, TUNED = 16, 4, 8  # unless told otherwise


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line; returns 0, or 2 after naming what was wrong."""
    return table_main(_parser(), arguments, _measure, _text)


def _measure(parsed: argparse.Namespace) -> Record:
    """Calibrates the contenders, then renders prompt after prompt; the files are written anew after each."""
    out, chosen, info = _checked(parsed), contenders(parsed.only), model_info(parsed.model)
    forgotten = contenders(parsed.forget) if parsed.forget else []
    settings = settings_from(parsed, "dense", info)
    tuned = parsed.tune_prompts if parsed.targets else 0
    whole, *_ = chosen_subsets(info, parsed.subset, parsed.prompts + tuned)
    subset = whole._replace(prompts=whole.prompts[: parsed.prompts])
    learned = [words.prompt for words in whole.prompts[parsed.prompts :]]
    sampler, everyone = CacheSampler(settings), contenders()
    if parsed.targets:
        seed = settings.seed + parsed.prompts  # noise, too, is other than that of the prompts that are judged
        kept = out.with_suffix(".tuning.jsonl")
        everyone = chosen = target_contenders(settings, sampler.makes_clips, learned, seed, kept)
    more: Record = {"tuned_on": learned} if parsed.targets else {}
    if versions := peer_versions():
        more["peers"] = versions
    context, results = opened(out, sampler, subset, **more)
    for each in forgotten:
        results.forget(each.name)
    return _render(CacheBench(sampler, subset, results, parsed.every), everyone, chosen, context, out)


def _checked(parsed: argparse.Namespace) -> Path:
    if parsed.every < 1:
        raise ValueError(f"--every counts contenders between dense runs, from 1; got {parsed.every}")
    if parsed.targets and (parsed.only or parsed.forget):
        raise ValueError("--targets has contenders of its own; leave out --only and --forget")
    return checked_out(parsed.out)


def _render(
    bench: CacheBench, everyone: list[Contender], chosen: list[Contender], context: Record, out: Path
) -> Record:
    bench.settle(chosen)
    prompts = [words.prompt for words in bench.subset.prompts]
    table: Record = {}
    for index in range(len(prompts)):
        bench.render(index, chosen)
        known = [(each, found) for each in everyone if (found := bench.known(each))]
        table = summary(context, bench.results, known, prompts)
        if "tuned_on" in context:
            table["verdicts"] = targets.verdicts(table["contenders"])
        write_table(out, table, _text(table))
        figure = targets_figure(table) if "verdicts" in table else caches_figure(table["contenders"])
        if figure is not None:
            with staged(out.with_suffix(".svg")) as (scratch,):
                scratch.write_text(figure, encoding="utf-8")
    return table


def _text(table: Record) -> str:
    return targets.markdown(table) if "verdicts" in table else markdown(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.shapes.caches",
        description=__doc__,
        epilog="@FILE stands for the options that a file has, one a line.",
        fromfile_prefix_chars="@",
    )
    add_arguments(parser)
    parser.set_defaults(prompts=PROMPTS)
    parser.add_argument(
        "--every", type=int, default=EVERY, metavar="N", help=f"contenders between dense runs (default: {EVERY})"
    )
    parser.add_argument(
        "--targets", action="store_true", help="instead of caches, tune for quality targets and see who keeps them"
    )
    parser.add_argument(
        "--tune-prompts", type=int, default=TUNED, metavar="N", help=f"that tuning has (default: {TUNED})"
    )
    add_table_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
