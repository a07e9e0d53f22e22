"""What an evaluation of a shapes model depends on, and the command-line options that say it."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..info import ModelInfo, read_info
from .subsets import SUBSETS

SIZES = ("steps", "guidance", "frames", "height", "width")  # options whose defaults are the model's own


@dataclass(frozen=True)
class Settings:
    """What a clip or image depends on besides its prompt.

    Attributes:
        model: name of a shipped pipeline, or a folder in diffusers' format.
        attention: ``dense``, or a method that ``dit_accel.accelerate`` knows.
        options: settings of that method; the others keep its defaults. Empty for dense.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        seed: of the first prompt of a subset; the n-th uses ``seed + n``.
        frames: of a clip, a multiple of 4, plus 1; 1 for images.
        height: in pixels, a multiple of 16.
        width: in pixels, a multiple of 16.
        device: torch device.
        dtype: of the weights; the autoencoder of video pipelines stays in float32.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the report and the comparison share."""
    parser.add_argument("--model", default="shapes-wan", help="shipped model or pipeline folder (default: shapes-wan)")
    parser.add_argument("--subset", choices=SUBSETS, help="of the held-out prompts (default: what it was trained on)")
    parser.add_argument("--prompts", type=int, metavar="N", help="only the first N of a subset")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the method, for example dense_steps=6"
    )
    parser.add_argument("--steps", type=int, help="of sampling (default, also of the next four: the model's own)")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--frames", type=int, help="a multiple of 4, plus 1")
    parser.add_argument("--height", type=int, help="a multiple of 16")
    parser.add_argument("--width", type=int, help="a multiple of 16")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the n-th uses seed + n")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def settings_from(arguments: argparse.Namespace, attention: str, info: ModelInfo) -> Settings:
    """Settings from parsed options, and from the model where an option was not given.

    Raises:
        ValueError: if a value is out of range or an option is not NAME=VALUE.
    """
    given = {name: getattr(arguments, name) for name in SIZES}
    sizes = {name: getattr(info, name) if value is None else value for name, value in given.items()}
    _check_sizes(info, **sizes)
    options = _method_settings(attention, info, dict(_option(text) for text in arguments.option))
    others = {name: getattr(arguments, name) for name in ("model", "seed", "device", "dtype")}
    return Settings(attention=attention, options=options, **others, **sizes)


def model_folder(model: str) -> Path:
    """The folder of a shipped model's name or of a path.

    Raises:
        ValueError: if it is neither.
        FileNotFoundError: if it holds no pipeline.
    """
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").exists():
            raise FileNotFoundError(f"{model} holds no model_index.json; pass the folder that save_pretrained wrote")
        return Path(model)
    from .. import path

    return path(model)


def model_info(model: str) -> ModelInfo:
    """What the model's ``shapes.json`` says.

    Raises:
        ValueError: if there is no such model, or the file is damaged.
        FileNotFoundError: if the folder holds no pipeline, or no ``shapes.json``.
    """
    return read_info(model_folder(model))


def _check_sizes(info: ModelInfo, steps: int, guidance: float, frames: int, height: int, width: int) -> None:
    if not info.motion and frames != 1:
        raise ValueError(f"this model makes images: leave out --frames, got {frames}")
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"--frames must be a multiple of 4, plus 1 (1, 5, ... 33); got {frames}")
    for name, value in (("height", height), ("width", width)):
        if value < 16 or value % 16:
            raise ValueError(f"--{name} must be a multiple of 16; got {value}")
    if steps < 1:
        raise ValueError(f"--steps must be at least 1; got {steps}")
    if not guidance >= 0:
        raise ValueError(f"--guidance must be at least 0; got {guidance}")


def _method_settings(attention: str, info: ModelInfo, given: dict[str, Any]) -> dict[str, Any]:
    if attention == "dense":
        if given:
            raise ValueError("--option belongs to a sparse method; add --attention radial or leave it out")
        return {}
    from ...processors import processor_by_name

    chosen = info.attention | given
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
