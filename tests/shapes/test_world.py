"""The grammar of the shapes world, both ways."""

from __future__ import annotations

import itertools
import random

import pytest

from dit_accel.shapes.world import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    ObjectWords,
    SceneWords,
    grammar_words,
    is_basic,
    parse_prompt,
    say,
)

RED_LEFT = SceneWords((ObjectWords("red", "circle", motion="left"),), "gray")
STRAIGHT = ("left", "right", "up", "down")


def some_words(seed: int, motion: bool) -> SceneWords:
    """Any sentence of the grammar, also one that training never draws."""
    rng = random.Random(seed)
    slots = (tuple(COLORS), SHAPES, tuple(SIZES), TEXTURES, MOTIONS)
    objects = tuple(ObjectWords(*map(rng.choice, slots)) for _ in range(rng.randint(1, 3)))
    if not motion:
        objects = tuple(item._replace(motion=None) for item in objects)
    return SceneWords(objects, rng.choice(list(BACKGROUNDS)), rng.random() < 0.5)


@pytest.mark.parametrize("motion", [True, False])
def test_every_sentence_reads_back(motion: bool) -> None:
    for seed in range(400):
        words = some_words(seed, motion)
        assert parse_prompt(words.prompt) == words
        assert set(words.prompt.split()) <= set(grammar_words())


def test_sentences_of_the_first_version_mean_what_they_meant() -> None:
    everything = list(itertools.product(COLORS, SHAPES, STRAIGHT, BACKGROUNDS))
    assert len(everything) == 288
    for color, shape, motion, background in everything:
        words = SceneWords((ObjectWords(color, shape, "medium", "plain", motion),), background, False)
        sentence = f"a {color} {shape} moving {motion} on a {background} background"
        assert say(words) == words.prompt == sentence
        assert parse_prompt(sentence) == words
        assert is_basic(words)


@pytest.mark.parametrize(
    ("sentence", "objects", "gradient"),
    [
        ("a red circle on a gray background", [("red", "circle", "medium", "plain", None)], False),
        (
            "a small striped cyan square standing still on a gradient gray background",
            [("cyan", "square", "small", "striped", "still")],
            True,
        ),
        (
            "a large blue triangle moving diagonally and a checked red circle circling on a gray background",
            [("blue", "triangle", "large", "plain", "diagonally"), ("red", "circle", "medium", "checked", "circling")],
            False,
        ),
    ],
)
def test_what_a_sentence_says(sentence: str, objects: list[tuple[str, ...]], gradient: bool) -> None:
    words = SceneWords(tuple(ObjectWords(*item) for item in objects), "gray", gradient)
    assert parse_prompt(sentence) == words
    assert say(words) == sentence


@pytest.mark.parametrize(
    "prompt", ["A Red circle  moving left\non a gray background.", "an red circle moving left on a gray background!"]
)
def test_small_liberties_are_allowed(prompt: str) -> None:
    assert parse_prompt(prompt) == RED_LEFT


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "speaks one sentence"),
        ("a red circle", "speaks one sentence"),
        ("a red on a gray background", "speaks one sentence"),
        ("a small striped red on a gray background", "speaks one sentence"),
        ("two red circles moving left on a gray background", "speaks one sentence"),
        ("a pink circle on a gray background", "unknown color 'pink'.*red, green, blue, yellow, cyan, magenta"),
        ("a huge red circle on a gray background", r"unknown color 'huge'.*size \(small, large\)"),
        ("a medium red circle on a gray background", "unknown color 'medium'"),
        ("a striped small red circle on a gray background", "unknown color 'small'.*in this order"),
        ("a red hexagon on a gray background", "unknown shape 'hexagon'.*circle, square, triangle"),
        ("a red circle moving north on a gray background", "unknown motion 'moving north'.*moving up"),
        ("a red circle moving on a gray background", "unknown motion 'moving'"),
        ("a red circle still on a gray background", "unknown motion 'still'.*standing still"),
        ("a red circle on a red background", "unknown background 'red'.*black, gray, white, brown"),
        ("a red circle on a gray gradient background", "unknown background 'gray gradient'"),
        ("a red circle and a blue square moving up on a gray background", "every object .* has a motion .* or none"),
        (f"{' and '.join(['a red circle'] * 4)} on a gray background", "1 to 3 objects; got 4"),
    ],
)
def test_a_bad_sentence_is_refused_in_one_line(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_prompt(prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (RED_LEFT._replace(objects=()), "1 to 3 objects; got 0"),
        (RED_LEFT._replace(background="pink"), "unknown background 'pink'"),
        (RED_LEFT._replace(objects=(ObjectWords("red", "circle", "huge"),)), "unknown size 'huge'"),
        (RED_LEFT._replace(objects=(ObjectWords("red", "circle", texture="dotted"),)), "unknown texture 'dotted'"),
        (RED_LEFT._replace(objects=(ObjectWords("red", "circle", motion="north"),)), "unknown motion 'north'"),
    ],
)
def test_bad_words_cannot_be_said(words: SceneWords, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        say(words)


def test_the_vocabulary_is_complete_and_ordered() -> None:
    words = grammar_words()
    assert len(words) == len(set(words)) == 31
    assert words[:9] == ("a", "and", "on", "background", "gradient", "small", "large", "striped", "checked")
    assert words[-4:] == tuple(BACKGROUNDS)
    said = {word for seed in range(200) for word in some_words(seed, motion=True).prompt.split()}
    assert said == set(words)
