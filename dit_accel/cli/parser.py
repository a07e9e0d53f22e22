"""The words and options of ``dit-accel``. Nothing here needs torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from . import doctor, inspect, profile_blocks, render, simulate, train_gate, tune
from .errors import UsageError

Adder = Callable[..., argparse.Action]


class Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage and leaving, so that every error is reported in one way."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Turns argparse's complaint into ours."""
        raise UsageError(f"{message}; see '{self.prog} --help'")


class Version(argparse.Action):
    """Imports the package only when its version is asked for."""

    def __call__(self, *_: Any) -> NoReturn:
        """Prints the version and leaves."""
        from .versions import package_version

        print(f"dit-accel {package_version()}")
        raise SystemExit(0)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; the result of parsing carries the function to call as ``command``."""
    parser = Parser(prog="dit-accel", description="Faster video diffusion: render, simulate, diagnose.")
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (render, simulate, inspect, train_gate, tune, profile_blocks, doctor):
        child = commands.add_parser(module.NAME, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(child)
        child.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        child.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
        child.set_defaults(command=module.run)
    return parser
