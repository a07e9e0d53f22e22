"""Where an object is in every frame."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .scene import SceneObject

DIRECTIONS: dict[str, tuple[int, int]] = {  # of straight motion, (x, y) with y pointing down
    "still": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "diagonally": (1, 1),
}


def trajectory(item: SceneObject, frames: int, height: int, width: int) -> torch.Tensor:
    """Position (x, y) of an object in pixels for every frame, ``[frames, 2]`` float32.

    The whole way is spread over the frames: straight motion is half-way in the middle one, a circling object is back
    where it began in the last one. A single frame shows the middle of a straight way, and the beginning of an orbit.
    """
    straight, orbit = paths([item], frames)
    return (straight[0] * torch.tensor([width, height]) + orbit[0] * min(height, width)).float()


def paths(items: Sequence[SceneObject], frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of the trajectories of objects with the same motion; they grow differently with the frame.

    Returns:
        Straight motion, as fractions of width and height, and the way round the orbit's center, as fractions of the
        shorter side; each ``[objects, frames, 2]`` float64.
    """
    progress = torch.linspace(-0.5, 0.5, frames, dtype=torch.float64) if frames > 1 else torch.zeros(1).double()
    center = torch.tensor([item.center for item in items], dtype=torch.float64)[:, None].expand(-1, frames, 2)
    travel = torch.tensor([item.travel for item in items], dtype=torch.float64)[:, None, None]
    motion = items[0].words.motion or "still"
    if motion != "circling":
        return center + progress[:, None] * travel * torch.tensor(DIRECTIONS[motion]), torch.zeros_like(center)
    turned = progress + 0.5 if frames > 1 else progress
    phase = torch.tensor([item.phase for item in items], dtype=torch.float64)[:, None]
    angle = phase + 2 * math.pi * turned  # y points down, so growing angles turn clockwise on screen
    return center, travel * torch.stack([angle.cos(), angle.sin()], -1)
