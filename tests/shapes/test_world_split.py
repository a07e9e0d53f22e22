"""Which sentences of the shapes world are held out, and which ones training draws."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest

from dit_accel.shapes.world import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    SUBSETS,
    TEXTURES,
    ObjectWords,
    SceneWords,
    held_out,
    is_basic,
    is_held_out,
    parse_prompt,
    sample_words,
)

STRAIGHT = ("left", "right", "up", "down")


def some_words(seed: int, motion: bool) -> SceneWords:
    """Any sentence of the grammar, also one that training never draws."""
    rng = random.Random(seed)
    slots = (tuple(COLORS), SHAPES, tuple(SIZES), TEXTURES, MOTIONS)
    objects = tuple(ObjectWords(*map(rng.choice, slots)) for _ in range(rng.randint(1, 3)))
    if not motion:
        objects = tuple(item._replace(motion=None) for item in objects)
    return SceneWords(objects, rng.choice(list(BACKGROUNDS)), rng.random() < 0.5)


def test_the_basic_held_out_sentences_are_those_of_the_first_version() -> None:
    everything = list(itertools.product(COLORS, SHAPES, STRAIGHT, BACKGROUNDS))
    random.Random("held out").shuffle(everything)
    sentences = [
        f"a {color} {shape} moving {motion} on a {ground} background" for color, shape, motion, ground in everything
    ]
    assert [words.prompt for words in held_out("basic", 64, motion=True)] == sentences[:64]
    assert sentences[0] == "a cyan triangle moving up on a white background"
    assert [is_held_out(parse_prompt(sentence)) for sentence in sentences] == [True] * 64 + [False] * 224


@pytest.mark.parametrize(
    ("subset", "motion", "first"),
    [
        ("single", True, "a small checked green square moving right on a gray background"),
        ("single", False, "a large checked cyan circle on a gray background"),
        (
            "pair",
            True,
            "a small striped blue triangle moving right and a checked green triangle moving left "
            "on a gradient white background",
        ),
        ("pair", False, "a small checked cyan square and a small yellow triangle on a gradient gray background"),
    ],
)
def test_the_held_out_sentences_are_the_same_everywhere(subset: str, motion: bool, first: str) -> None:
    sentences = held_out(subset, 128, motion=motion)
    assert sentences[0].prompt == first
    assert held_out(subset, 8, motion=motion) == sentences[:8]
    assert len(set(sentences)) == 128
    for words in sentences:
        assert is_held_out(words)
        assert len(words.objects) == (2 if subset == "pair" else 1)
        assert all((item.motion is not None) == motion for item in words.objects)


@pytest.mark.parametrize("motion", [True, False])
@pytest.mark.parametrize("subset", ["single", "pair"])
def test_every_held_out_word_comes_about_equally_often(subset: str, motion: bool) -> None:
    columns = [
        (*itertools.chain(*words.objects), words.background, words.gradient)
        for words in held_out(subset, 120, motion=motion)
    ]
    for values in zip(*columns, strict=True):
        counts = Counter(values)
        mean = 120 / len(counts)
        assert all(abs(count - mean) <= 0.2 * mean for count in counts.values()), counts
    texture, color = 3, 0
    assert {words[texture] for words in columns} == set(TEXTURES)
    assert {words[color] for words in columns} == set(COLORS)


def test_a_tenth_of_all_other_sentences_is_held_out() -> None:
    everything = {some_words(seed, motion=bool(seed % 2)) for seed in range(3000)}
    others = [words for words in everything if not is_basic(words)]
    assert 0.08 < sum(map(is_held_out, others)) / len(others) < 0.12


def test_the_order_of_objects_does_not_decide_what_is_held_out() -> None:
    for words in held_out("pair", 32, motion=True):
        assert is_held_out(words._replace(objects=words.objects[::-1]))


@pytest.mark.parametrize(
    ("subset", "count", "motion", "message"),
    [
        ("triple", 1, True, "basic, single, pair"),
        ("basic", 1, False, "single or pair"),
        ("basic", 65, True, "at most the 64 .*; got 65"),
        ("single", 140, False, "at most the 139 .*; got 140"),
        ("pair", 0, True, "at least 1"),
    ],
)
def test_bad_requests_for_held_out_sentences(subset: str, count: int, motion: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        held_out(subset, count, motion=motion)


@pytest.mark.parametrize(("objects", "motion"), [*itertools.product((1, 2, 3), (True, False))])
def test_training_draws_every_word_but_no_held_out_sentence(objects: int, motion: bool) -> None:
    rng = random.Random(objects)
    drawn = [sample_words(rng, objects=objects, motion=motion) for _ in range(600)]
    assert not any(map(is_held_out, drawn))
    sizes = {1: set(SIZES), 2: {"small", "medium"}, 3: {"small", "medium"}}[objects]
    expected = (set(COLORS), set(SHAPES), sizes, set(TEXTURES), set(MOTIONS) if motion else {None})
    for place in range(objects):
        assert tuple(map(set, zip(*(words.objects[place] for words in drawn), strict=True))) == expected
    assert {(words.background, words.gradient) for words in drawn} == set(
        itertools.product(BACKGROUNDS, (True, False))
    )
    for words in drawn:
        assert len({item.color for item in words.objects}) == objects
        assert objects < 3 or [item.size for item in words.objects].count("medium") <= 1


def test_plain_training_draws_the_basic_sentences_that_are_not_held_out() -> None:
    rng = random.Random(3)
    drawn = {sample_words(rng, plain=True) for _ in range(4000)}
    assert len(drawn) == 288 - 64
    assert all(is_basic(words) and not is_held_out(words) for words in drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objects": 0}, "1 to 3; got 0"),
        ({"objects": 4}, "1 to 3; got 4"),
        ({"objects": 2, "plain": True}, "plain=True means one moving object"),
        ({"motion": False, "plain": True}, "plain=True means one moving object"),
    ],
)
def test_bad_requests_for_sentences(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_words(random.Random(0), **arguments)


def test_the_subsets_have_names() -> None:
    assert SUBSETS == ("basic", "single", "pair")
