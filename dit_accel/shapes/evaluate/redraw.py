"""Draws anew what was read off a clip, for analysis by synthesis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..world import ObjectWords, backdrop, texture_color
from .outline import draw

if TYPE_CHECKING:
    from .observation import Observation


def redraw(seen: Observation, height: int, width: int, scale: float = 1.0) -> torch.Tensor:
    """The scene with the words, places and sizes that were read, ``[frames or 1, 3, height, width]`` in [0, 1].

    Colors are those of the words, so a wrong tone counts as a difference. An object without a clear color or shape is
    left out; a surface without a clear texture is drawn plain, a background without a word in its mean color. One
    frame stands for all if there is no object.

    Args:
        seen: what was read.
        height: of the drawing, in pixels.
        width: likewise.
        scale: pixels of the clip to one pixel of the drawing.

    Raises:
        ValueError: if no background was found.
    """
    if seen.background_rgb is None:
        raise ValueError("nothing was read off this clip, because it has no even background; there is nothing to draw")
    if seen.background is None:
        drawn = torch.tensor(seen.background_rgb).view(1, 3, 1, 1).expand(1, 3, height, width)
    else:
        drawn = backdrop(seen.background, bool(seen.gradient), height, width)[None]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    for item in seen.objects:  # largest first
        if item.color is None or item.shape is None:
            continue
        words = ObjectWords(item.color, item.shape, texture=item.texture or "plain")
        centers, radius = item.centers / scale, item.radius / scale
        x, y = (numbers + 0.5 - centers[:, axis, None, None] for axis, numbers in enumerate((columns, rows)))
        surface = texture_color(words, x, y, radius[:, None, None])
        coverage = draw(item.shape, centers, radius, rows, columns)[:, None]
        drawn = drawn + coverage.nan_to_num(0) * (surface.nan_to_num(0) - drawn)  # NaN where a frame does not show it
    return drawn
