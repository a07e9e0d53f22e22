"""A small procedural world with known truth: one coloured shape moving over a plain background.

Every clip is described by a :class:`Scene`, drawn by :func:`render` and named by one prompt. The vocabulary is closed,
so a prompt can be parsed back (:func:`parse_prompt`) and a video can be judged without a neural network
(:mod:`dit_accel.shapes.evaluate`).
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.10, 0.10),
    "green": (0.10, 0.80, 0.15),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "cyan": (0.10, 0.90, 0.95),
    "magenta": (0.95, 0.10, 0.90),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.02, 0.02, 0.02),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.98, 0.98, 0.98),
    "brown": (0.42, 0.24, 0.08),
}
TEMPLATE = "a {color} {shape} moving {motion} on a {background} background"
_PATTERN = re.compile(
    r"an? (?P<color>\w+) (?P<shape>\w+) moving (?P<motion>\w+) on an? (?P<background>\w+) background[.!]?"
)
HELD_OUT_PROMPTS = 64


class Attributes(NamedTuple):
    """What a prompt says: one word for each of colour, shape, motion and background."""

    color: str
    shape: str
    motion: str
    background: str

    @property
    def prompt(self) -> str:
        """The one sentence of this world's grammar that says it."""
        return TEMPLATE.format(**self._asdict())


@dataclass(frozen=True)
class Scene:
    """One clip: what the prompt says, and what it leaves open.

    Attributes:
        attributes: the words of the prompt.
        size: radius of the shape, as a fraction of the shorter side of the frame.
        center: position (x, y) of the shape half-way through the clip, as fractions of width and height.
        travel: distance covered from the first to the last frame, as a fraction of the side moved along.
    """

    attributes: Attributes
    size: float
    center: tuple[float, float]
    travel: float

    @property
    def prompt(self) -> str:
        """The sentence that names this scene."""
        return self.attributes.prompt


class Clip(NamedTuple):
    """A rendered scene with its truth.

    Attributes:
        video: ``[frames, 3, height, width]`` float32 in [0, 1].
        mask: ``[frames, 1, height, width]`` float32 coverage of the shape in [0, 1].
        centers: ``[frames, 2]`` position (x, y) of the shape in pixels.
    """

    video: torch.Tensor
    mask: torch.Tensor
    centers: torch.Tensor


def all_attributes() -> list[Attributes]:
    """Every sentence of the world, in a fixed order."""
    return [Attributes(*words) for words in itertools.product(COLORS, SHAPES, MOTIONS, BACKGROUNDS)]


def held_out_attributes() -> list[Attributes]:
    """The 64 combinations that training never sees; the same on every machine."""
    shuffled = all_attributes()
    random.Random("held out").shuffle(shuffled)
    return shuffled[:HELD_OUT_PROMPTS]


def training_attributes() -> list[Attributes]:
    """Every combination that is not held out."""
    held_out = set(held_out_attributes())
    return [attributes for attributes in all_attributes() if attributes not in held_out]


def parse_prompt(prompt: str) -> Attributes:
    """Reads a sentence of the world back into its words.

    Raises:
        ValueError: if the sentence does not follow the grammar or uses a word the world does not know.
    """
    match = _PATTERN.fullmatch(" ".join(prompt.lower().split()))
    if match is None:
        raise ValueError(f"the shapes world speaks one sentence, {TEMPLATE!r}; got {prompt!r}")
    known = {"color": COLORS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}
    for slot, words in known.items():
        if match[slot] not in words:
            raise ValueError(f"unknown {slot} {match[slot]!r} in the shapes world; choose one of {', '.join(words)}")
    return Attributes(**match.groupdict())


def sample_scene(rng: random.Random, attributes: Attributes | None = None) -> Scene:
    """Draws the open parts of a scene (size, place, distance), and the words too if none are given."""
    if attributes is None:
        attributes = rng.choice(training_attributes())
    size = rng.uniform(0.12, 0.22)
    travel = rng.uniform(0.30, 0.50)
    along = rng.uniform(0.45, 0.55)
    across = rng.uniform(0.30, 0.70)
    horizontal = MOTIONS[attributes.motion][0] != 0
    return Scene(attributes, size, (along, across) if horizontal else (across, along), travel)


def render(scene: Scene, frames: int, height: int, width: int) -> Clip:
    """Draws a scene with anti-aliased edges.

    Args:
        scene: what to draw.
        frames: number of frames, at least 1; the whole travel is spread over them.
        height: frame height in pixels.
        width: frame width in pixels.
    """
    centers = trajectory(scene, frames, height, width)
    rows = (torch.arange(height) + 0.5)[None, :, None] - centers[:, 1, None, None]
    columns = (torch.arange(width) + 0.5)[None, None, :] - centers[:, 0, None, None]
    distance = signed_distance(scene.attributes.shape, columns, rows, scene.size * min(height, width))
    mask = (0.5 - distance).clamp(0, 1)[:, None]
    color = torch.tensor(COLORS[scene.attributes.color]).view(1, 3, 1, 1)
    background = torch.tensor(BACKGROUNDS[scene.attributes.background]).view(1, 3, 1, 1)
    return Clip(background + mask * (color - background), mask, centers)


def trajectory(scene: Scene, frames: int, height: int, width: int) -> torch.Tensor:
    """Position (x, y) of the shape in pixels for every frame, ``[frames, 2]``."""
    side = torch.tensor([width, height], dtype=torch.float32)
    direction = torch.tensor(MOTIONS[scene.attributes.motion], dtype=torch.float32)
    progress = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    offset = progress[:, None] * scene.travel * direction
    return (torch.tensor(scene.center) + offset) * side


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Distance in pixels from the outline of a shape centred at the origin; negative inside.

    ``x`` and ``y`` broadcast against each other; ``radius`` is that of the circle with about the same area.
    """
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.886 * radius
    if shape == "triangle":  # equilateral, point up; three half-planes at the same distance from the centroid
        inner = 0.778 * radius
        slanted = x.abs() * 0.866 - y * 0.5
        return torch.maximum(slanted, y.expand_as(slanted)) - inner
    raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
