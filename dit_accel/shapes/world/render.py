"""Draws scenes, with the truth about them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .motion import trajectory
from .outline import signed_distance, texture_color
from .scene import Scene
from .words import BACKGROUNDS

SHADE = 0.25  # how far a gradient mixes the background with black at the top edge, and with white at the bottom edge


class Clip(NamedTuple):
    """A rendered scene with its truth.

    Attributes:
        video: ``[frames, 3, height, width]`` float32 in [0, 1].
        masks: ``[frames, objects, height, width]`` float32 in [0, 1], how much of a pixel shows the object. Later
            objects are drawn over earlier ones.
        centers: ``[frames, objects, 2]`` positions (x, y) in pixels.
        backdrop: ``[3, height, width]`` the empty background.
    """

    video: torch.Tensor
    masks: torch.Tensor
    centers: torch.Tensor
    backdrop: torch.Tensor


def render(scene: Scene, frames: int, height: int, width: int, *, device: str | torch.device = "cpu") -> Clip:
    """Draws a scene with anti-aliased edges.

    Args:
        scene: what to draw.
        frames: number of frames, at least 1; the whole way of every object is spread over them.
        height: frame height in pixels.
        width: frame width in pixels.
        device: where to draw; the result stays there.

    Raises:
        ValueError: if a side or the number of frames is not positive.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"frames, height and width must be at least 1; got {frames}, {height} and {width}")
    centers = torch.stack([trajectory(item, frames, height, width) for item in scene.objects], 1).to(device)
    empty = backdrop(scene.background, scene.gradient, height, width, device=device)
    video = empty.expand(frames, 3, height, width).clone()
    masks = torch.empty(frames, len(scene.objects), height, width, device=device)
    for index, item in enumerate(scene.objects):
        x = (torch.arange(width, device=device) + 0.5) - centers[:, index, 0, None, None]
        y = (torch.arange(height, device=device) + 0.5)[:, None] - centers[:, index, 1, None, None]
        radius = item.size * min(height, width)
        coverage = (0.5 - signed_distance(item.words.shape, x, y, radius)).clamp_(0, 1)
        masks[:, :index] *= 1 - coverage[:, None]
        masks[:, index] = coverage
        video.lerp_(texture_color(item.words, x, y, radius).expand_as(video), coverage[:, None])
    return Clip(video, masks, centers, empty)


def backdrop(
    background: str, gradient: bool, height: int, width: int, *, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """The empty background, RGB ``[3, height, width]``.

    A gradient runs linearly from the color mixed with a quarter of black at the top edge to the color mixed with a
    quarter of white at the bottom edge.
    """
    color = torch.tensor(BACKGROUNDS[background], device=device).view(3, 1, 1)
    if gradient:
        down = ((torch.arange(height, device=device) + 0.5) / height)[:, None]
        color = (1 - SHADE) * color + SHADE * down
    return color.expand(3, height, width).contiguous()
