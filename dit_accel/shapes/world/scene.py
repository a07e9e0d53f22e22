"""Scenes: what a sentence says about a picture or clip, and what it leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from .words import ObjectWords, SceneWords


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        words: what the sentence says about it.
        size: radius, as a fraction of the shorter side of the frame; that of the circle with about the same area.
        center: (x, y) half-way through the clip, as fractions of width and height; circling: center of the orbit.
        travel: fraction of the side(s) moved along from the first to the last frame; circling: radius of the orbit, as
            a fraction of the shorter side; 0 if it stands still.
        phase: circling: where on the orbit it is in the first frame, in radians clockwise from the right.
    """

    words: ObjectWords
    size: float
    center: tuple[float, float]
    travel: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything that :func:`dit_accel.shapes.world.render` needs besides length and resolution.

    Attributes:
        objects: drawn in this order.
        background: a word of ``BACKGROUNDS``.
        gradient: whether the background runs from darker (top) to lighter (bottom).
    """

    objects: tuple[SceneObject, ...]
    background: str
    gradient: bool = False

    @property
    def words(self) -> SceneWords:
        """What the sentence says."""
        return SceneWords(tuple(item.words for item in self.objects), self.background, self.gradient)

    @property
    def prompt(self) -> str:
        """The sentence that names this scene."""
        return self.words.prompt
