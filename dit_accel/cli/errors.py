"""Errors that end the command with one line and an exit code."""

from __future__ import annotations

import sys
import traceback

UNEXPECTED = 1


class CommandError(Exception):
    """Ends the command with one line on stderr and this class's exit code."""

    exit_code = UNEXPECTED


class UsageError(CommandError):
    """The input is wrong; the message says what is accepted."""

    exit_code = 2


class EnvironmentProblem(CommandError):
    """The input is fine, but this machine lacks something; the message says how to get it."""

    exit_code = 3


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of an error without line breaks, cut after ``limit`` characters; its type if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def with_type(error: BaseException) -> str:
    """The same after the error's type, for errors of other people's code."""
    return f"{type(error).__name__}: {one_line(error)}"


def report_error(error: Exception, debug: bool) -> int:
    """Prints an error (with its traceback if ``debug``) to stderr and returns the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, CommandError):
        print(f"dit-accel: error: {one_line(error, limit=1000)}", file=sys.stderr)
        return error.exit_code
    hint = "" if debug else " (--debug shows the traceback)"
    print(f"dit-accel: error: unexpected {type(error).__name__}: {one_line(error)}{hint}", file=sys.stderr)
    return UNEXPECTED
