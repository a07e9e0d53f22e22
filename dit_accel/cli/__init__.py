"""The ``dit-accel`` command. Heavy packages are imported by the sub-commands that need them, not here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .errors import report_error
from .parser import build_parser

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the words after the program's name; those of this process if omitted.

    Returns:
        The exit code: 0 done, 1 unexpected failure, 2 bad input, 3 a problem of the environment, 130 interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        options = build_parser().parse_args(words)
        code: int = options.command(options)
        return code
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("dit-accel: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return report_error(error, debug="--debug" in words)
