"""A prompt for people: its words with the wrong ones marked, and what was seen instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, TEXTURES, SceneWords
from .judging import OBJECT_SLOTS
from .records import Record

SAYS = {
    "color": COLORS,
    "shape": SHAPES,
    "size": SIZES,
    "texture": TEXTURES,
    "motion": MOTIONS,
    "background": BACKGROUNDS,
    "gradient": ("gradient",),
}
SLOT_OF = {word: slot for slot, words in SAYS.items() for word in words}


class Word(NamedTuple):
    """A word of a sentence, the slot it fills (None for words like "on"), and whether the clip shows another."""

    text: str
    slot: str | None
    wrong: bool


def marked_words(words: SceneWords, judgement: Record) -> list[Word]:
    """The sentence word by word.

    Args:
        words: what the prompt says.
        judgement: what :func:`.judging.judged` said of the clip.
    """
    marked, number = [], 0
    for text in words.prompt.split():
        slot = SLOT_OF.get(text)
        number += text == "and"
        marked.append(Word(text, slot, slot is not None and _is_wrong(words, judgement, slot, number)))
    return marked


def seen_instead(words: SceneWords, judgement: Record) -> list[str]:
    """What the clip shows in place of wrong words; "?" where it does not decide."""
    wrong = [slot for slot, right in judgement["right"].items() if not right]
    if None in judgement["match"] and "count" not in wrong:
        wrong.append("count")  # otherwise nothing would be said of an object that is missing
    return [found for slot in wrong for found in _seen(words, judgement, slot)]


def _is_wrong(words: SceneWords, judgement: Record, slot: str, number: int) -> bool:
    """Whether a slot of one object, or of the whole scene, is judged and wrong."""
    if judgement["right"].get(slot, True):
        return False
    if slot not in OBJECT_SLOTS:
        return True
    index = judgement["match"][number]
    found = None if index is None else judgement["seen"]["objects"][index][slot]
    return bool(found != getattr(words.objects[number], slot))


def _seen(words: SceneWords, judgement: Record, slot: str) -> Iterator[str]:
    seen = judgement["seen"]
    if slot == "count":
        yield f"{seen['count']} object" + ("s" if seen["count"] != 1 else "")
    elif slot == "gradient":
        yield {True: "gradient", False: "no gradient", None: "gradient ?"}[seen["gradient"]]
    elif slot == "background":
        yield seen["background"] or "?"
    else:
        for number, index in enumerate(judgement["match"]):
            if index is not None and _is_wrong(words, judgement, slot, number):
                yield seen["objects"][index][slot] or "?"
