"""Draws sentences for training, and what a sentence leaves open."""

from __future__ import annotations

import math
import random

from .motion import DIRECTIONS
from .place import first_apart
from .scene import Scene, SceneObject
from .split import BASIC_MOTIONS, is_held_out
from .words import BACKGROUNDS, COLORS, MOST_OBJECTS, MOTIONS, SHAPES, SIZES, TEXTURES, ObjectWords, SceneWords

INSIDE = 0.8  # least distance of a center from the edges, in radii, among several; at most 30 % are out of view then
PLACES, LAYOUTS = 32, 200  # attempts to place an object among those before it, and to place all of them
TRAVEL = {"diagonally": (0.25, 0.38), "circling": (0.14, 0.22)}  # of one object; other moves 0.30 to 0.50
TRAVEL_AMONG_OTHERS = {"diagonally": (0.20, 0.32), "circling": (0.14, 0.18)}  # other moves 0.20 to 0.40


def sample_words(rng: random.Random, *, objects: int = 1, motion: bool = True, plain: bool = False) -> SceneWords:
    """Draws a sentence that is not held out.

    Args:
        rng: source of randomness.
        objects: 1 to 3. They differ in color. Two are small or medium; of three, all but at most one are small.
        motion: whether the objects have a motion (a clip) or not (an image).
        plain: only basic sentences: one medium plain object moving left, right, up or down on a plain background.

    Raises:
        ValueError: if ``objects`` is not 1 to 3, or basic sentences are wanted without motion or of several objects.
    """
    if not 1 <= objects <= MOST_OBJECTS:
        raise ValueError(f"objects must be 1 to {MOST_OBJECTS}; got {objects}")
    if plain and (objects > 1 or not motion):
        raise ValueError("plain=True means one moving object; leave it out for images and for several objects")
    while True:
        words = _basic_words(rng) if plain else _any_words(rng, objects, motion)
        if not is_held_out(words):
            return words


def sample_scene(rng: random.Random, words: SceneWords) -> Scene:
    """Draws what a sentence leaves open: sizes, places, distances and where orbits begin.

    At all times and in frames of any height and width, objects do not touch and at least 60 % of each is in view.

    Raises:
        ValueError: if the objects cannot be placed so, or a word is unknown.
    """
    prompt, several = words.prompt, len(words.objects) > 1
    for _ in range(LAYOUTS):
        placed: list[SceneObject] = []
        while len(placed) < len(words.objects):
            item = words.objects[len(placed)]
            candidates = [_draw_object(rng, item, several) for _ in range(PLACES if placed else 1)]
            found = first_apart(candidates, placed)
            if found is None:
                break
            placed.append(found)
        else:
            return Scene(tuple(placed), words.background, words.gradient)
    raise ValueError(f"no room for all objects of {prompt!r}; make some of them small")


def _basic_words(rng: random.Random) -> SceneWords:
    item = ObjectWords(rng.choice(tuple(COLORS)), rng.choice(SHAPES), motion=rng.choice(BASIC_MOTIONS))
    return SceneWords((item,), rng.choice(tuple(BACKGROUNDS)))


def _any_words(rng: random.Random, objects: int, motion: bool) -> SceneWords:
    colors = rng.sample(tuple(COLORS), objects)
    sizes = [rng.choice(tuple(SIZES) if objects == 1 else ("small", "medium")) for _ in colors]
    if objects == MOST_OBJECTS:
        medium = rng.randrange(objects + 1)  # the last number stands for none
        sizes = ["medium" if index == medium else "small" for index in range(objects)]
    items = tuple(
        ObjectWords(color, rng.choice(SHAPES), size, rng.choice(TEXTURES), rng.choice(MOTIONS) if motion else None)
        for color, size in zip(colors, sizes, strict=True)
    )
    return SceneWords(items, rng.choice(tuple(BACKGROUNDS)), rng.random() < 0.5)


def _draw_object(rng: random.Random, words: ObjectWords, several: bool) -> SceneObject:
    size, travel, phase = rng.uniform(*SIZES[words.size]), 0.0, 0.0
    x, y = DIRECTIONS.get(words.motion or "still", (2, 2))  # an orbit is twice as wide as its radius
    if (x, y) != (0, 0):
        ranges, others = (TRAVEL_AMONG_OTHERS, (0.20, 0.40)) if several else (TRAVEL, (0.30, 0.50))
        travel = rng.uniform(*ranges.get(words.motion or "still", others))
    if words.motion == "circling":
        phase = rng.uniform(0, 2 * math.pi)
    if several:
        margins = [abs(way) * travel / 2 + INSIDE * size for way in (x, y)]
    elif x and y:
        margins = [0.42, 0.42]
    else:
        margins = [0.45 if way else 0.30 for way in (x, y)]
    center = [rng.uniform(margin, 1 - margin) for margin in margins]
    return SceneObject(words, size, (center[0], center[1]), travel, phase)
