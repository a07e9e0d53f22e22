"""The closed vocabulary of the shapes world, and what one sentence says."""

from __future__ import annotations

from typing import NamedTuple

RGB = tuple[float, float, float]

COLORS: dict[str, RGB] = {
    "red": (0.95, 0.10, 0.10),
    "green": (0.10, 0.80, 0.15),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "cyan": (0.10, 0.90, 0.95),
    "magenta": (0.95, 0.10, 0.90),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
SIZES: dict[str, tuple[float, float]] = {  # least and largest radius, as fractions of the shorter side
    "small": (0.08, 0.10),
    "medium": (0.13, 0.155),
    "large": (0.20, 0.24),
}
TEXTURES: tuple[str, ...] = ("plain", "striped", "checked")
MOTIONS: tuple[str, ...] = ("still", "left", "right", "up", "down", "diagonally", "circling")
BACKGROUNDS: dict[str, RGB] = {
    "black": (0.02, 0.02, 0.02),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.98, 0.98, 0.98),
    "brown": (0.42, 0.24, 0.08),
}
MOST_OBJECTS = 3


class ObjectWords(NamedTuple):
    """What a sentence says about one object.

    Attributes:
        color: a word of ``COLORS``.
        shape: a word of ``SHAPES``.
        size: a word of ``SIZES``; "medium" is not said.
        texture: a word of ``TEXTURES``; "plain" is not said.
        motion: a word of ``MOTIONS``; None in the prompt of an image.
    """

    color: str
    shape: str
    size: str = "medium"
    texture: str = "plain"
    motion: str | None = None


class SceneWords(NamedTuple):
    """What one sentence says.

    Attributes:
        objects: one to three; either all of them have a motion (a clip) or none has (an image).
        background: a word of ``BACKGROUNDS``.
        gradient: whether the background runs from darker to lighter.
    """

    objects: tuple[ObjectWords, ...]
    background: str
    gradient: bool = False

    @property
    def prompt(self) -> str:
        """The sentence, by :func:`dit_accel.shapes.world.say`."""
        from .grammar import say

        return say(self)
