"""What an evaluation of a shapes model depends on, and the command-line options that say it."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .world import HELD_OUT_PROMPTS, Attributes, held_out_attributes

METHOD_OPTIONS = ("dense_steps", "dense_layers", "block", "decay")  # the entries of defaults.json that tune attention


@dataclass(frozen=True)
class Settings:
    """What a clip depends on besides its prompt.

    Attributes:
        model: name of a shipped pipeline, or a folder in diffusers' format.
        attention: ``dense``, or a method that ``dit_accel.accelerate`` knows.
        options: settings of that method; the others keep its defaults. Empty for dense.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        seed: of the first prompt; the n-th uses ``seed + n``.
        frames: of a clip; multiples of 4, plus 1.
        height: in pixels, a multiple of 16.
        width: in pixels, a multiple of 16.
        device: torch device.
        dtype: of transformer and text encoder; the autoencoder runs in float32.
    """

    model: str
    attention: str
    options: dict[str, Any]
    steps: int
    guidance: float
    seed: int
    frames: int
    height: int
    width: int
    device: str
    dtype: str


def prompts(count: int) -> list[Attributes]:
    """The first held-out prompts.

    Raises:
        ValueError: if there are not so many.
    """
    if not 1 <= count <= HELD_OUT_PROMPTS:
        raise ValueError(f"--prompts must be 1 to {HELD_OUT_PROMPTS}, the held-out combinations; got {count}")
    return held_out_attributes()[:count]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the report and the comparison share, with the shipped model's defaults."""
    defaults = shipped_defaults()
    parser.add_argument(
        "--prompts", type=int, default=HELD_OUT_PROMPTS, help="how many of the held-out ones (default: all)"
    )
    parser.add_argument("--model", default="shapes-wan", help="shipped model or pipeline folder (default: shapes-wan)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the method, for example dense_steps=6"
    )
    parser.add_argument("--steps", type=int, default=defaults["steps"])
    parser.add_argument("--guidance", type=float, default=defaults["guidance"])
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the n-th uses seed + n")
    parser.add_argument("--frames", type=int, default=defaults["frames"], help="a multiple of 4, plus 1")
    parser.add_argument("--height", type=int, default=defaults["height"], help="a multiple of 16")
    parser.add_argument("--width", type=int, default=defaults["width"], help="a multiple of 16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def settings_from(arguments: argparse.Namespace, attention: str) -> Settings:
    """Settings from parsed options.

    Raises:
        ValueError: if a value is out of range or an option is not NAME=VALUE.
    """
    if arguments.frames < 1 or arguments.frames % 4 != 1:
        raise ValueError(f"--frames must be a multiple of 4, plus 1 (1, 5, ... 33); got {arguments.frames}")
    for name in ("height", "width"):
        value = getattr(arguments, name)
        if value < 16 or value % 16:
            raise ValueError(f"--{name} must be a multiple of 16; got {value}")
    if arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1; got {arguments.steps}")
    options = _method_settings(attention, dict(_option(text) for text in arguments.option))
    names = ("model", "steps", "guidance", "seed", "frames", "height", "width", "device", "dtype")
    return Settings(attention=attention, options=options, **{name: getattr(arguments, name) for name in names})


def shipped_defaults() -> dict[str, Any]:
    """How the shipped model is sampled, and the settings of sparse attention that suit its small token grid."""
    defaults: dict[str, Any] = json.loads((Path(__file__).parent / "defaults.json").read_text(encoding="utf-8"))
    return defaults


def _method_settings(attention: str, given: dict[str, Any]) -> dict[str, Any]:
    if attention == "dense":
        if given:
            raise ValueError("--option belongs to a sparse method; add --attention radial or leave it out")
        return {}
    from ..processors import processor_by_name

    chosen = {name: value for name, value in shipped_defaults().items() if name in METHOD_OPTIONS} | given
    processor_by_name(attention, **chosen)  # raises on bad settings, before the model is loaded
    return chosen


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--option wants NAME=VALUE, for example dense_steps=4; got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
