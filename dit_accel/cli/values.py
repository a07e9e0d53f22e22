"""What an option's text may be: converters for argparse that say what is accepted."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

NONE = object()
"""An option that was given and means None; one that is None was not given."""


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A converter for whole numbers in a range."""
    accepted = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"give a whole number {accepted}, got {text!r}")
        return value

    return convert


def real(minimum: float, above: bool = False) -> Callable[[str], float]:
    """A converter for finite numbers from ``minimum`` on, or above it."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > minimum if above else value >= minimum)):
            bound = "above" if above else "of at least"
            raise argparse.ArgumentTypeError(f"give a number {bound} {minimum:g}, got {text!r}")
        return value

    return convert


def dense_steps(text: str) -> int | float:
    """A count of steps (``12``) or a share of all steps (``0.25``)."""
    try:
        value = float(text) if any(mark in text for mark in ".eE") else int(text)
    except ValueError:
        value = -1
    if value < 0 or (isinstance(value, float) and not value <= 1):
        raise argparse.ArgumentTypeError(f"give a count of steps (12) or a share of them (0.25), got {text!r}")
    return value


def steps(text: str) -> tuple[int | float, ...]:
    """Steps counted from 0 (``30``) or shares of all (``0.6``), with commas between; none of them for ``""``."""
    return tuple(dense_steps(part) for part in text.split(",") if part.strip())


def amount(text: str) -> int | float:
    """A number above 0; whole ones are counts of blocks (``12``), others parts (``0.25``) or multiples (``1.5``)."""
    value = real(0, above=True)(text)
    return int(text) if text.strip().isdecimal() else value


def amounts(text: str) -> int | float | tuple[int | float, ...]:
    """An :func:`amount`, or several of them (``3,20,15``)."""
    several = tuple(amount(part) for part in text.split(","))
    return several if "," in text else several[0]


def patch(text: str) -> tuple[int, int]:
    """Height x width in tokens (``3x4``)."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"give height x width in tokens, such as 3x4, got {text!r}")
    return height, width


def dense_layers(text: str) -> int | set[int]:
    """How many first layers (``1``), or which ones (``0,3,29``; ``3,`` for one)."""
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"give a count of layers (1) or a list of them (0,3,29), got {text!r}")
    return set(numbers) if "," in text else numbers[0]


def schedule(text: str) -> dict[str, Any]:
    """A schedule as JSON, ``{"step_budget": [[0.0, 2.0], [0.5, 1.0]]}``; its values are checked by the method."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        example = '{"step_budget": [[0.0, 2.0], [0.5, 1.0]]}'
        raise argparse.ArgumentTypeError(f"give a JSON object, such as {example}, got {text!r}")
    return value


def grid(text: str) -> tuple[int, int, int]:
    """A token grid, frames x height x width (``18x48x80``)."""
    try:
        frames, height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        frames = height = width = 0
    if min(frames, height, width) < 1:
        raise argparse.ArgumentTypeError(f"give frames x height x width in tokens, such as 18x48x80, got {text!r}")
    return frames, height, width


def early_and_later(value: Callable[[str], Any]) -> Callable[[str], Any]:
    """A converter for one value (``0.4``), or two, for the early and the later steps (``0.95,0.5``)."""

    def convert(text: str) -> Any:
        both = tuple(value(part) for part in text.split(","))
        if len(both) > 2:
            raise argparse.ArgumentTypeError(f"give one value, or two: for early and later steps, got {text!r}")
        return both if len(both) == 2 else both[0]

    return convert


def whole_or_grid(text: str) -> int | tuple[int, int, int]:
    """A number (``64``), or frames x height x width (``1x2x4``)."""
    return grid(text) if "x" in text.lower() else whole(1)(text)


def wholes(text: str) -> tuple[int, ...]:
    """Whole numbers above 0, with commas between (``1,2``)."""
    return tuple(whole(1)(part) for part in text.split(","))


def seed_or_even(text: str) -> Any:
    """A seed, or ``even`` for an even spread in place of a draw, which is :data:`NONE`."""
    if text == "even":
        return NONE
    try:
        return whole(0, 2**32 - 1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or give even") from error
