"""Which held-out prompts a model is judged on, by which of their words, and what it is calibrated on."""

from __future__ import annotations

import random
from typing import NamedTuple

from ..evaluate import SLOTS
from ..info import ModelInfo
from ..world import SUBSETS, SceneWords, held_out, sample_words

COUNTS = {"basic": 64, "single": 128, "pair": 64}  # prompts, unless told otherwise
JUDGED_ON = {"basic": ("basic",), "all": ("single", "pair")}  # subsets, by what the model was trained on
# Size, texture and gradient are not judged: every basic sentence says, or leaves out, the same of them.
BASIC_SLOTS = ("color", "shape", "motion", "background", "count")

__all__ = ["SUBSETS", "Subset", "calibration_words", "chosen_subsets"]


class Subset(NamedTuple):
    """Some held-out prompts.

    Attributes:
        name: a word of ``SUBSETS``.
        prompts: what each says.
        slots: which of their words are judged.
    """

    name: str
    prompts: list[SceneWords]
    slots: tuple[str, ...]


def chosen_subsets(info: ModelInfo, name: str | None = None, count: int | None = None) -> list[Subset]:
    """The subset of that name, or those that fit what the model was trained on.

    Args:
        info: of the model.
        name: a word of ``SUBSETS``; None for the model's own.
        count: prompts of each; None for 64 basic ones, 128 of one object and 64 of two.

    Raises:
        ValueError: if the model makes images and the subset has none, or there are not so many prompts.
    """
    names = JUDGED_ON[info.subset] if name is None else (name,)
    return [_subset(info, each, COUNTS[each] if count is None else count) for each in names]


def calibration_words(info: ModelInfo) -> SceneWords:
    """The sentence that contenders are calibrated on: always the same, and of training, so that none is judged on it.

    Args:
        info: of the model.
    """
    basic, rng = info.subset == "basic", random.Random("calibration")
    objects = 1 if basic else rng.randint(1, 2)
    return sample_words(rng, objects=objects, motion=info.motion, plain=basic)


def _subset(info: ModelInfo, name: str, count: int) -> Subset:
    try:
        prompts = held_out(name, count, motion=info.motion)
    except ValueError as error:
        raise ValueError(f"cannot take {count} prompts of subset {name}: {error}") from error
    return Subset(name, prompts, BASIC_SLOTS if name == "basic" else SLOTS)
