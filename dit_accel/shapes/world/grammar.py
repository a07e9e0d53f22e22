"""One grammar both ways: words to sentence (:func:`say`) and sentence to words (:func:`parse_prompt`)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .words import BACKGROUNDS, COLORS, MOST_OBJECTS, MOTIONS, SHAPES, SIZES, TEXTURES, ObjectWords, SceneWords

GRAMMAR = (
    "a [small|large] [striped|checked] COLOR SHAPE [standing still|moving DIRECTION|circling] {and a ...} "
    "on a [gradient] BACKGROUND background"
)
_UNSAID = ("medium", "plain")
_SAID = {"still": "standing still", "circling": "circling"}
_PHRASES = {_SAID.get(motion, f"moving {motion}"): motion for motion in MOTIONS}
_SENTENCE = re.compile(r"an? (?P<objects>.+) on an? (?P<gradient>gradient )?(?P<background>.+) background[.!]?")


def say(words: SceneWords) -> str:
    """The sentence of the shapes world that says ``words``.

    Raises:
        ValueError: if a word is unknown, there are no or too many objects, or only some of them have a motion.
    """
    _check(words)
    objects = " and ".join(_say_object(item) for item in words.objects)
    return f"{objects} on a {'gradient ' if words.gradient else ''}{words.background} background"


def parse_prompt(prompt: str) -> SceneWords:
    """Reads a sentence of the shapes world back into its words.

    Upper case, more white space, "an" and a mark at the end are allowed.

    Raises:
        ValueError: if the sentence does not follow the grammar or uses a word that the world does not know.
    """
    match = _SENTENCE.fullmatch(" ".join(prompt.lower().split()))
    if match is None:
        raise _other_sentence(prompt)
    objects = tuple(_parse_object(phrase, prompt) for phrase in re.split(r" and an? ", match["objects"]))
    words = SceneWords(objects, match["background"], match["gradient"] is not None)
    _check(words)
    return words


def grammar_words() -> tuple[str, ...]:
    """Every word that the grammar can produce, once each, in a fixed order (for tokenizers)."""
    adjectives = [word for word in (*SIZES, *TEXTURES) if word not in _UNSAID]
    motions = [word for phrase in _PHRASES for word in phrase.split()]
    frame = ["a", "and", "on", "background", "gradient"]
    return tuple(dict.fromkeys([*frame, *adjectives, *COLORS, *SHAPES, *motions, *BACKGROUNDS]))


def _say_object(item: ObjectWords) -> str:
    motion = () if item.motion is None else (_SAID.get(item.motion, f"moving {item.motion}"),)
    adjectives = (word for word in (item.size, item.texture) if word not in _UNSAID)
    return " ".join(["a", *adjectives, item.color, item.shape, *motion])


def _parse_object(phrase: str, prompt: str) -> ObjectWords:
    words = phrase.split()
    said = {"size": "medium", "texture": "plain"}
    for slot, known in (("size", SIZES), ("texture", TEXTURES)):
        if words and words[0] in known and words[0] not in _UNSAID:
            said[slot] = words.pop(0)
    if len(words) < 2:
        raise _other_sentence(prompt)
    color, shape, *rest = words
    _known(
        "color",
        color,
        COLORS,
        "; size (small, large) and texture (striped, checked) may come before it, in this order",
    )
    _known("shape", shape, SHAPES)
    motion = " ".join(rest)
    if motion:
        _known("motion", motion, _PHRASES)
    return ObjectWords(color, shape, **said, motion=_PHRASES[motion] if motion else None)


def _check(words: SceneWords) -> None:
    if not 1 <= len(words.objects) <= MOST_OBJECTS:
        raise ValueError(f"a scene of the shapes world has 1 to {MOST_OBJECTS} objects; got {len(words.objects)}")
    for item in words.objects:
        _known("color", item.color, COLORS)
        _known("shape", item.shape, SHAPES)
        _known("size", item.size, SIZES)
        _known("texture", item.texture, TEXTURES)
        if item.motion is not None:
            _known("motion", item.motion, MOTIONS)
    if len({item.motion is None for item in words.objects}) > 1:
        raise ValueError("either every object of a sentence has a motion (a clip) or none has (an image)")
    _known("background", words.background, BACKGROUNDS)


def _known(slot: str, word: str, words: Iterable[str], hint: str = "") -> None:
    choices = tuple(words)
    if word not in choices:
        raise ValueError(f"unknown {slot} {word!r} in the shapes world; choose one of {', '.join(choices)}{hint}")


def _other_sentence(prompt: str) -> ValueError:
    return ValueError(f"the shapes world speaks one sentence, {GRAMMAR!r}; got {prompt!r}")
