"""What sentences leave open: sizes, places and ways of objects."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dit_accel.shapes.world import (
    SIZES,
    ObjectWords,
    Scene,
    SceneObject,
    parse_prompt,
    render,
    sample_scene,
    sample_words,
)
from dit_accel.shapes.world.place import first_apart

WAYS = {
    "standing still": ("still", 0.0, 0.0),
    "moving left": ("left", 0.30, 0.50),
    "moving down": ("down", 0.30, 0.50),
    "moving diagonally": ("diagonally", 0.25, 0.38),
    "circling": ("circling", 0.14, 0.22),
}
CROWDED = (
    "a red triangle circling and a small blue triangle circling and a small green triangle circling",
    "a red triangle moving diagonally and a small blue triangle circling and a small green square moving up",
    "a striped red triangle circling and a blue triangle circling",
    "a red triangle moving left and a small blue circle moving right and a small cyan square moving left",
    "a large red triangle and a large blue square",
)


def some_scenes(objects: int, count: int) -> list[Scene]:
    rng = random.Random(f"{objects} objects")
    return [sample_scene(rng, sample_words(rng, objects=objects, motion=n % 4 > 0)) for n in range(count)]


def crowded_scenes() -> list[Scene]:
    rng = random.Random(1)
    return [
        sample_scene(rng, parse_prompt(f"{objects} on a gray background")) for objects in CROWDED for _ in range(3)
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_one_object_moves_and_measures_what_its_words_say(way: str, size: str) -> None:
    motion, least, most = WAYS[way]
    words = parse_prompt(f"a {size} red circle {way} on a gray background".replace("medium ", ""))
    rng = random.Random(way)
    items = [sample_scene(rng, words).objects[0] for _ in range(50)]
    assert {item.words.motion for item in items} == {motion}
    assert all(least <= item.travel <= most for item in items)
    assert all(SIZES[size][0] <= item.size <= SIZES[size][1] for item in items)
    assert len({item.center for item in items}) == 50
    turns = [item.phase / (2 * math.pi) for item in items]
    assert (min(turns) < 0.1 and max(turns) > 0.9) if motion == "circling" else set(turns) == {0.0}


@pytest.mark.parametrize("objects", [2, 3])
def test_several_objects_move_visibly(objects: int) -> None:
    for item in (item for scene in some_scenes(objects, 40) for item in scene.objects):
        least = {"still": 0.0, None: 0.0, "circling": 0.14}.get(item.words.motion, 0.2)
        assert item.travel >= least


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_a_scene_is_the_same_for_the_same_seed(objects: int) -> None:
    words = sample_words(random.Random(7), objects=objects)
    first, again, other = (sample_scene(random.Random(seed), words) for seed in (1, 1, 2))
    assert first == again != other
    assert first.words == other.words == words
    assert first.prompt == words.prompt


@pytest.mark.parametrize(("frames", "height", "width"), [(33, 64, 64), (17, 48, 144), (17, 160, 64), (9, 64, 88)])
def test_objects_never_touch_and_stay_in_view(frames: int, height: int, width: int) -> None:
    for scene in (*some_scenes(2, 25), *some_scenes(3, 15), *crowded_scenes()):
        masks = render(scene, frames, height, width).masks
        assert int((masks > 0).sum(1).max()) == 1, scene.prompt
        radii = torch.tensor([item.size * min(height, width) for item in scene.objects])
        in_view = masks.sum((2, 3)) / (math.pi * radii.square())
        assert float(in_view.min()) >= 0.6, scene.prompt


@pytest.mark.parametrize("size", ["large", "small"])
def test_one_object_stays_in_view(size: str) -> None:
    rng = random.Random(2)
    for way in WAYS:
        for shape in ("circle", "square", "triangle"):
            scene = sample_scene(rng, parse_prompt(f"a {size} red {shape} {way} on a gray background"))
            area = render(scene, 9, 96, 64).masks.sum((2, 3))
            assert float(area.min()) >= 0.6 * math.pi * (scene.objects[0].size * 64) ** 2


def test_objects_without_room_are_refused() -> None:
    everywhere = " and ".join(f"a large {color} triangle circling" for color in ("red", "green", "blue"))
    with pytest.raises(ValueError, match=r"no room for all objects .* make some of them small"):
        sample_scene(random.Random(0), parse_prompt(f"{everywhere} on a gray background"))


@pytest.mark.parametrize(
    ("shape", "other", "x", "y"),  # of two objects of radius 0.1; their nearest distance that keeps the gap
    [
        ("circle", "circle", 0.23, 0.0),
        ("square", "square", 0.2072, 0.0),
        ("square", "square", 0.0, 0.2072),
        ("circle", "square", 0.2186, 0.0),
        ("triangle", "triangle", 0.2995, 0.0),
        ("triangle", "square", 0.0, 0.1964),
        ("square", "triangle", 0.0, 0.2742),
    ],
)
def test_the_gap_between_outlines(shape: str, other: str, x: float, y: float) -> None:
    standing = SceneObject(ObjectWords("blue", other), 0.1, (0.5, 0.5))
    near, far = (
        SceneObject(ObjectWords("red", shape), 0.1, (0.5 - share * x, 0.5 - share * y)) for share in (0.99, 1.01)
    )
    assert first_apart([near], [standing]) is None
    assert first_apart([near, far], [standing]) is far
    assert first_apart([near, far], []) is near


@pytest.mark.parametrize("wide", [True, False])
def test_an_orbit_that_sweeps_over_an_object_in_another_frame_is_refused(wide: bool) -> None:
    offset, frame = ((0.1, 0.0), (64, 160)) if wide else ((0.0, 0.1), (160, 64))
    inside = SceneObject(ObjectWords("red", "circle", motion="still"), 0.08, (0.5 + offset[0], 0.5 + offset[1]))
    circling = SceneObject(ObjectWords("blue", "circle", motion="circling"), 0.08, (0.5, 0.5), 0.3)
    scene = Scene((inside, circling), "gray")
    assert int((render(scene, 33, 64, 64).masks > 0).sum(1).max()) == 1
    assert int((render(scene, 33, *frame).masks > 0).sum(1).max()) == 2
    assert first_apart([circling], [inside]) is None
    assert first_apart([inside], [circling]) is None
