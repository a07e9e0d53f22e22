"""Where a table of contenders is written, and the options that say which of them take part."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ...files import staged
from .records import Record, write_json
from .results import Results
from .sampling import Sampler
from .subsets import Subset


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--only``, ``--forget``, and either ``--out`` or ``--table``."""
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this contender; repeatable")
    parser.add_argument(
        "--forget", action="append", default=[], metavar="NAME", help="measure this contender anew; repeatable"
    )
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("--out", type=Path, help="JSON file to write; a Markdown table is written beside it")
    files.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file, and run nothing")


def checked_out(out: Path | None) -> Path:
    """The file to write.

    Raises:
        ValueError: if it is no JSON file.
    """
    if out is None or out.suffix != ".json":
        raise ValueError(f"--out must be a .json file; got {out}")
    return out


def write_table(out: Path, table: Record, text: str) -> None:
    """Writes the JSON, and the Markdown beside it."""
    write_json(out, table)
    with staged(out.with_suffix(".md")) as (scratch,):
        scratch.write_text(text)


def opened(out: Path, sampler: Sampler, subset: Subset, **more: object) -> tuple[Record, Results]:
    """What all results depend on, and those that an earlier run left beside the file to write.

    Raises:
        ValueError: if they are results of other settings.
    """
    context = {**sampler.context(), "subset": subset.name, "slots": list(subset.slots), **more}
    return context, Results(out.with_suffix(".progress.jsonl"), context)


def table_main(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    measure: Callable[[argparse.Namespace], Record],
    markdown: Callable[[Record], str],
) -> int:
    """Measures or reads a table, and prints it; returns 0, or 2 after naming what was wrong."""
    parsed = parser.parse_args(arguments)
    try:
        text = _read(parsed.table, markdown) if parsed.table else markdown(measure(parsed))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def _read(file: Path, markdown: Callable[[Record], str]) -> str:
    table = json.loads(file.read_text())
    try:
        return markdown(table)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no table that this command has written; choose one of those") from error
