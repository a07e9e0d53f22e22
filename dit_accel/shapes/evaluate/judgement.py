"""Compares what a clip shows with the words of its prompt."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..world import ObjectWords, SceneWords
from .observation import Observation, ObservedObject, observe

OBJECT_SLOTS = ("color", "shape", "size", "texture", "motion")
SLOTS = (*OBJECT_SLOTS, "background", "gradient", "count")

Pairs = list[tuple[ObjectWords, "ObservedObject | None"]]


@dataclass(frozen=True)
class Score:
    """Which words of a prompt a clip shows.

    Attributes:
        right: of every slot judged, whether it is right for every object that the prompt names.
        bound: whether there are as many objects as named, and each has its own color and shape.
    """

    right: Mapping[str, bool]
    bound: bool

    @property
    def all(self) -> bool:
        """Whether every slot judged is right."""
        return all(self.right.values())


def score(video: torch.Tensor, words: SceneWords, slots: Sequence[str] | None = None) -> Score:
    """Observes a clip (see :func:`.observe`) and compares it with the words of its prompt (see :func:`judge`)."""
    _check(slots)
    return judge(observe(video), words, slots)


def judge(observation: Observation, words: SceneWords, slots: Sequence[str] | None = None) -> Score:
    """Compares an observation with the words of a prompt; an undecided word is wrong.

    Objects seen are matched with objects named so that as many of them as possible have their own color and shape,
    and then as many words as possible are right. An object that is missing makes all its slots wrong; one too many
    only the count.

    Args:
        observation: what was seen.
        words: what was said.
        slots: names of ``SLOTS`` to judge, all by default. Motion is dropped for words without motion.

    Raises:
        ValueError: if a slot is unknown, or none is left to judge.
    """
    _check(slots)
    moving = any(item.motion is not None for item in words.objects)
    judged = [slot for slot in SLOTS if (slots is None or slot in slots) and (slot != "motion" or moving)]
    if not judged:
        raise ValueError("no slot is left to judge: motion is not judged by the words of an image; name another slot")
    right_count = observation.count == len(words.objects)
    own = [slot for slot in judged if slot in OBJECT_SLOTS]
    pairs = max(_matchings(words, observation), key=lambda pairs: (_bound(pairs), _rights(pairs, own)))
    right = {
        **{slot: all(_right(pair, slot) for pair in pairs) for slot in own},
        "background": observation.background == words.background,
        "gradient": observation.gradient == words.gradient,
        "count": right_count,
    }
    return Score({slot: right[slot] for slot in judged}, right_count and _bound(pairs) == len(words.objects))


def _matchings(words: SceneWords, observation: Observation) -> list[Pairs]:
    missing = [None] * max(0, len(words.objects) - len(observation.objects))
    orders = itertools.permutations([*observation.objects, *missing], len(words.objects))
    return [list(zip(words.objects, order, strict=True)) for order in orders]


def _right(pair: tuple[ObjectWords, ObservedObject | None], slot: str) -> bool:
    said, seen = pair
    return seen is not None and getattr(seen, slot) == getattr(said, slot)


def _bound(pairs: Pairs) -> int:
    return sum(_right(pair, "color") and _right(pair, "shape") for pair in pairs)


def _rights(pairs: Pairs, slots: Sequence[str]) -> int:
    return sum(_right(pair, slot) for pair in pairs for slot in slots)


def _check(slots: Sequence[str] | None) -> None:
    unknown = [slot for slot in slots or () if slot not in SLOTS]
    if unknown or (slots is not None and not slots) or isinstance(slots, str):
        raise ValueError(f"slots must name some of {', '.join(SLOTS)}; got {slots!r}")
