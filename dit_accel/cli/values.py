"""What an option's text may be: converters for argparse that say what is accepted."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


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


def dense_layers(text: str) -> int | set[int]:
    """How many first layers (``1``), or which ones (``0,3,29``)."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"give a count of layers (1) or a list of them (0,3,29), got {text!r}")
    return set(numbers) if "," in text else numbers[0]


def grid(text: str) -> tuple[int, int, int]:
    """A token grid, frames x height x width (``18x48x80``)."""
    try:
        frames, height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        frames = height = width = 0
    if min(frames, height, width) < 1:
        raise argparse.ArgumentTypeError(f"give frames x height x width in tokens, such as 18x48x80, got {text!r}")
    return frames, height, width
