"""Judgements as JSON, captions and the grid."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from PIL import Image

from dit_accel.shapes.evaluate import SLOTS, Observation, ObservedObject, judge, observe
from dit_accel.shapes.report.caption import SAYS, marked_words, seen_instead
from dit_accel.shapes.report.grid import Cell, draw_grid, middle_frame
from dit_accel.shapes.report.judging import accuracy, best_match, judged
from dit_accel.shapes.report.subsets import BASIC_SLOTS
from dit_accel.shapes.world import SceneWords, grammar_words, held_out, parse_prompt, render, sample_scene

PAIR = parse_prompt(
    "a small striped red circle moving left and a checked blue square circling on a gradient gray background"
)
IMAGE_PAIR = parse_prompt("a red circle and a small blue square on a gray background")
BASIC = held_out("basic", 1, motion=True)[0]


def rendered(words: SceneWords, frames: int = 5) -> torch.Tensor:
    return render(sample_scene(random.Random(0), words), frames, 128, 192).video


def changed(words: SceneWords, number: int, **slots: str) -> SceneWords:
    objects = list(words.objects)
    objects[number] = objects[number]._replace(**slots)
    return words._replace(objects=tuple(objects))


@pytest.mark.parametrize(
    ("words", "frames", "slots"), [(BASIC, 5, BASIC_SLOTS), (PAIR, 5, SLOTS), (IMAGE_PAIR, 1, SLOTS)]
)
def test_judgements_are_plain_json(words: SceneWords, frames: int, slots: Sequence[str]) -> None:
    for video in (rendered(words, frames), torch.zeros(frames, 3, 64, 64)):
        judgement = json.loads(json.dumps(judged(video, words, slots), allow_nan=False))
        score = judge(observe(video), words, slots)
        assert judgement["right"] == score.right
        assert judgement["all"] == score.all
        assert judgement.get("bound", score.bound) == score.bound
        assert ("bound" in judgement) == (len(words.objects) > 1)
        assert judgement["seen"]["count"] == len(judgement["seen"]["objects"])
    assert judgement["match"] == [None] * len(words.objects)
    assert accuracy([judgement])["color"] == {"right": 0, "of": 1, "share": 0.0}


def test_tracks_follow_objects_and_images_have_none() -> None:
    seen = judged(rendered(BASIC, 33), BASIC, BASIC_SLOTS)["seen"]["objects"]
    assert len(seen) == 1 and len(seen[0]["track"]) == 9
    truth = render(sample_scene(random.Random(0), BASIC), 33, 128, 192).centers[:, 0]
    torch.testing.assert_close(torch.tensor(seen[0]["track"]), truth[::4], atol=1.5, rtol=0)
    assert [item["track"] for item in judged(rendered(IMAGE_PAIR, 1), IMAGE_PAIR, SLOTS)["seen"]["objects"]] == [
        None
    ] * 2


def sight(color: str, shape: str, size: str = "medium") -> ObservedObject:
    nothing = torch.full((1, 2), torch.nan)
    return ObservedObject(color, shape, size, "plain", None, nothing, nothing[:, 0], 1.0, (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    "seen",
    [
        [sight("blue", "square", "small"), sight("red", "circle")],
        [sight("red", "circle"), sight("blue", "square", "small"), sight("green", "circle")],
        [sight("blue", "circle"), sight("red", "square", "small")],
        [sight("red", "square", "small"), sight("red", "circle", "small")],
        [sight("blue", "square")],
        [],
    ],
)
def test_objects_are_matched_as_the_judge_does(seen: list[ObservedObject]) -> None:
    """Whatever the judge calls right of every object must be right in each matched pair, and the other way round."""
    verdict = judge(Observation(tuple(seen), len(seen), "gray", False), IMAGE_PAIR)
    match = best_match(IMAGE_PAIR.objects, seen, tuple(verdict.right))
    for slot in ("color", "shape", "size", "texture"):
        agree = [
            index is not None and getattr(seen[index], slot) == getattr(said, slot)
            for said, index in zip(IMAGE_PAIR.objects, match, strict=True)
        ]
        assert all(agree) == verdict.right[slot]


def test_every_word_that_says_something_can_be_marked() -> None:
    said = {word for words in SAYS.values() for word in words}
    assert set(grammar_words()) - said == {"a", "and", "on", "background", "moving", "standing"}
    for words in (*held_out("single", 8, motion=True), *held_out("pair", 8, motion=True)):
        judgement = judged(torch.zeros(2, 3, 64, 64), words, SLOTS)
        marked = marked_words(words, judgement)
        assert " ".join(word.text for word in marked) == words.prompt
        assert all(word.wrong for word in marked if word.slot not in (None, "background", "gradient"))
        assert not any(word.wrong for word in marked if word.slot is None)


@pytest.mark.parametrize(
    ("shown", "wrong", "instead"),
    [
        (PAIR, [], []),
        (changed(PAIR, 1, color="green"), ["blue"], ["green"]),
        (changed(PAIR, 0, texture="plain", motion="up"), ["striped", "left"], ["plain", "up"]),
        (changed(PAIR, 1, size="small"), [], ["small"]),  # "medium" is not said, so no word is wrong
        (PAIR._replace(gradient=False, background="white"), ["gradient", "gray"], ["white", "no gradient"]),
        (PAIR._replace(objects=PAIR.objects[:1]), ["checked", "blue", "square", "circling"], ["1 object"]),
    ],
)
def test_wrong_words_and_what_was_seen_instead(shown: SceneWords, wrong: list[str], instead: list[str]) -> None:
    judgement = judged(rendered(shown), PAIR, SLOTS)
    assert [word.text for word in marked_words(PAIR, judgement) if word.wrong] == wrong
    assert seen_instead(PAIR, judgement) == instead


def test_slots_that_are_not_judged_are_not_marked() -> None:
    judgement = judged(rendered(changed(BASIC, 0, size="large")), BASIC, BASIC_SLOTS)
    assert seen_instead(BASIC, judgement) == []
    for slots in (BASIC_SLOTS, ("color", "shape")):  # an object that is missing is told even if none are counted
        nothing = judged(torch.zeros(5, 3, 64, 64), BASIC, slots)
        assert seen_instead(BASIC, nothing).count("0 objects") == 1


def test_a_second_object_makes_a_basic_clip_wrong() -> None:
    one, other = "a red circle moving left", "a small blue square moving right"
    words, both = (parse_prompt(f"{text} on a gray background") for text in (one, f"{one} and {other}"))
    judgement = judged(rendered(both, 33), words, BASIC_SLOTS)
    assert [slot for slot, right in judgement["right"].items() if not right] == ["count"]
    assert not judgement["all"]
    assert seen_instead(words, judgement) == ["2 objects"]


def count(sheet: Image.Image, matches: Callable[[int, int, int], bool]) -> int:
    """Pixels whose color matches."""
    colors = sheet.getcolors(sheet.width * sheet.height)
    assert colors is not None
    return sum(number for number, color in colors if isinstance(color, tuple) and matches(*color))


def is_red(red: int, green: int, blue: int) -> bool:
    return red > green + 100 and red > blue + 100


def is_blue(red: int, green: int, blue: int) -> bool:
    return (red, green, blue) == (0, 0, 255)


def test_the_grid_marks_wrong_words_only() -> None:
    frame = middle_frame(torch.zeros(3, 3, 128, 192))
    assert frame.size == (192, 128)
    shown = (PAIR, changed(PAIR, 0, color="green"), PAIR._replace(objects=PAIR.objects[:1]))
    cells = [Cell(frame, PAIR, judged(rendered(words), PAIR, SLOTS)) for words in shown]
    reds = [count(draw_grid([("two objects", [cell])]), is_red) for cell in cells]
    assert reds[0] == 0
    assert 20 < reds[1] < reds[2]


def test_the_grid_holds_every_part_and_cell() -> None:
    picture = judged(rendered(IMAGE_PAIR, 1), IMAGE_PAIR, SLOTS)
    cell = Cell(Image.new("RGB", (64, 64), "blue"), IMAGE_PAIR, picture)
    one, five = draw_grid([("", [cell])]), draw_grid([("", [cell] * 5)])
    both = draw_grid([("one object", [cell]), ("two objects", [cell] * 5)])
    assert count(one, is_blue) == 224 * 224  # nothing is drawn over an image
    assert count(five, is_blue) == 5 * 224 * 224
    assert (both.width, both.height) == (five.width, one.height + five.height)


def test_the_track_of_a_clip_is_drawn() -> None:
    blank = Image.new("RGB", (192, 128), (0, 128, 0))
    cell = Cell(blank, PAIR, judged(rendered(PAIR), PAIR, SLOTS))
    sheet = draw_grid([("", [cell])])
    left, top = 8, 24 + 8
    picture = sheet.crop((left, top, left + 224, top + 149))
    for item in cell.judgement["seen"]["objects"]:
        (x, y), (end_x, end_y) = ([value * 224 / 192 for value in item["track"][place]] for place in (0, -1))
        if item["motion"] != "circling":  # that one ends where it began
            assert picture.getpixel((round(x), round(y))) == (0, 0, 0)
        assert picture.getpixel((round(end_x), round(end_y))) == (255, 255, 255)
