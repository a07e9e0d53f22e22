"""Form and surface of an object: distance from its outline, and its colors."""

from __future__ import annotations

import torch

from .words import COLORS, RGB, SHAPES, ObjectWords

SQUARE = 0.886  # half the side of a square, of the radius of the circle with the same area
TRIANGLE = 0.778  # distance of the sides of an equilateral triangle from its centroid, likewise
BAND = 0.4  # height of a stripe and side of a check, of the radius
STRIPES_BEGIN = {"circle": 0.0, "square": 0.0, "triangle": 0.18}  # of the radius; half of the surface is striped then


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float | torch.Tensor) -> torch.Tensor:
    """Distance in pixels from the outline of a shape centered at the origin; negative inside.

    ``x``, ``y`` and ``radius`` broadcast; ``radius`` is that of the circle with about the same area.

    Raises:
        ValueError: if the shape is unknown.
    """
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - SQUARE * radius
    if shape == "triangle":  # equilateral, point up; three half-planes at the same distance from the centroid
        slanted = x.abs() * 0.866 - y * 0.5
        return torch.maximum(slanted, y.expand_as(slanted)) - TRIANGLE * radius
    raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")


def reach(shape: str) -> tuple[float, float, float, float]:
    """How far a shape reaches from its center sideways, up, down and in all, of the radius."""
    if shape == "triangle":
        return TRIANGLE * 3**0.5, 2 * TRIANGLE, TRIANGLE, 2 * TRIANGLE
    return (SQUARE, SQUARE, SQUARE, SQUARE * 2**0.5) if shape == "square" else (1.0, 1.0, 1.0, 1.0)


def texture_color(words: ObjectWords, x: torch.Tensor, y: torch.Tensor, radius: float | torch.Tensor) -> torch.Tensor:
    """Surface of an object around its center, as if it had no outline.

    Args:
        words: color, shape and texture count.
        x: pixels right of the center, ``[..., 1, width]``.
        y: pixels below the center, ``[..., height, 1]``.
        radius: of the object in pixels; broadcasts against ``x`` and ``y``.

    Returns:
        RGB that broadcasts to ``[..., 3, height, width]``.
    """
    first = torch.tensor(COLORS[words.color], device=x.device).view(3, 1, 1)
    if words.texture == "plain":
        return first
    second = torch.tensor(second_color(words.color), device=x.device).view(3, 1, 1)
    share = _bands(y - STRIPES_BEGIN[words.shape] * radius, BAND * radius)
    if words.texture == "checked":
        across = _bands(x, BAND * radius)
        share = share * across + (1 - share) * (1 - across)
    return first + share.unsqueeze(-3) * (second - first)


def second_color(color: str) -> RGB:
    """RGB of the light stripes and checks of a color: mixed half with white."""
    red, green, blue = COLORS[color]
    return (1 + red) / 2, (1 + green) / 2, (1 + blue) / 2


def _bands(position: torch.Tensor, band: float | torch.Tensor) -> torch.Tensor:
    """Anti-aliased square wave in [0, 1] that is 1 from 0 to ``band``, 0 from there to twice as far, and so on."""
    within = torch.remainder(position + band / 2, 2 * band) - band / 2
    return (0.5 + band / 2 - (within - band / 2).abs()).clamp(0, 1)
