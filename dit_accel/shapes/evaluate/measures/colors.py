"""Which pixels have a color of the world."""

from __future__ import annotations

import torch

from ....metrics.checks import check_frames, check_values
from ...world import BACKGROUNDS, COLORS, second_color
from . import regions


def color_mask(video: torch.Tensor, color: str, *, textured: bool = False) -> torch.Tensor:
    """Pixels nearer to a color than to any other color or background of the world, ``[frames, height, width]`` bool.

    Args:
        video: the video.
        color: word of ``COLORS``.
        textured: whether the light halves of stripes and checks count as their color.

    Raises:
        ValueError: if the color is unknown, or the video has another layout.
    """
    check_frames(video, 1, "color_mask")
    check_values(video)
    if color not in COLORS:
        raise ValueError(f"unknown color {color!r} in the shapes world; choose one of {', '.join(COLORS)}")
    light = [second_color(word) for word in COLORS] if textured else []
    palette = torch.tensor([*COLORS.values(), *light, *BACKGROUNDS.values()], device=video.device)
    index = torch.cdist(video.float().movedim(1, -1).flatten(0, 2), palette).argmin(1).view_as(video[:, 0])
    word = list(COLORS).index(color)
    return (index == word) | ((index == word + len(COLORS)) & textured)


def color_share(video: torch.Tensor, mask: torch.Tensor, color: str, *, textured: bool = False) -> float:
    """Share of a mask's pixels that have a color (see :func:`color_mask`), in [0, 1]."""
    return float(color_mask(video, color, textured=textured)[regions.inside(video, mask)].float().mean())


def leak(video: torch.Tensor, mask: torch.Tensor, color: str, *, margin: int = 4, textured: bool = False) -> float:
    """Share of the pixels outside a mask that have a color (see :func:`color_mask`), in [0, 1]."""
    return float(color_mask(video, color, textured=textured)[regions.outside(video, mask, margin)].float().mean())


def color_drift(video: torch.Tensor, mask: torch.Tensor) -> float:
    """Standard deviation over frames of the mean color inside a mask, averaged over red, green and blue.

    Raises:
        ValueError: if shapes do not fit, or fewer than two frames have a mask.
    """
    inside = regions.joined(video, mask)
    shown = inside.any(2).any(1)
    if int(shown.sum()) < 2:
        raise ValueError("color_drift needs a mask in at least 2 frames; this one is empty in all others")
    weights = inside[shown].double()[:, None]
    means = (video[shown] * weights).sum((2, 3)) / weights.sum((2, 3))
    return float(means.std(0, unbiased=False).mean())
