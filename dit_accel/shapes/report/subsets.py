"""Which held-out prompts a model is judged on, and by which of their words."""

from __future__ import annotations

from typing import NamedTuple

from ..evaluate import SLOTS
from ..info import ModelInfo
from ..world import SUBSETS, SceneWords, held_out

COUNTS = {"basic": 64, "single": 128, "pair": 64}  # prompts, unless told otherwise
JUDGED_ON = {"basic": ("basic",), "all": ("single", "pair")}  # subsets, by what the model was trained on
BASIC_SLOTS = ("color", "shape", "motion", "background")  # the others have one word each in basic sentences

__all__ = ["SUBSETS", "Subset", "chosen_subsets"]


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


def _subset(info: ModelInfo, name: str, count: int) -> Subset:
    try:
        prompts = held_out(name, count, motion=info.motion)
    except ValueError as error:
        raise ValueError(f"cannot take {count} prompts of subset {name}: {error}") from error
    return Subset(name, prompts, BASIC_SLOTS if name == "basic" else SLOTS)
