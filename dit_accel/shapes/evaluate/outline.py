"""Fits the outlines of the shapes world to masks."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from ..world import SHAPES, SIZES, signed_distance
from .working import moments

DIAMOND = "diamond"  # a square on its corner: none of the world's shapes, but nearer to a circle than to a square
LEAST_OVERLAP = 0.75  # intersection over union below which a mask is no shape of the world
CLEAR = 0.02  # how much more the best outline must overlap than the next; the world's differ by 0.1
SHAPE_FRAMES = 9  # frames that decide which shape it is
MARGIN = 0.2  # of the mask's extent, kept around it in a window


class Fit(NamedTuple):
    """One shape fitted to masks.

    Attributes:
        centers: ``[n, 2]`` (x, y) in pixels, of the whole shape where the frame's edge cuts it.
        radius: ``[n]`` pixels.
        overlap: ``[n]`` intersection over union of mask and fit.
    """

    centers: torch.Tensor
    radius: torch.Tensor
    overlap: torch.Tensor

    def pick(self, chosen: torch.Tensor) -> Fit:
        """Some of the frames."""
        return Fit(*(part[chosen] for part in self))


class Window(NamedTuple):
    """The part of every frame around its mask.

    Attributes:
        mask: ``[n, window height, window width]`` bool.
        rows: ``[n, window height, 1]`` row numbers in the frame.
        columns: ``[n, 1, window width]`` column numbers in the frame.
    """

    mask: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def cut(self, video: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """The same part of ``[frames, 3, height, width]``: ``[n, 3, window height, window width]``."""
        return video.permute(0, 2, 3, 1)[frames[:, None, None], self.rows, self.columns].permute(0, 3, 1, 2)

    def pick(self, chosen: torch.Tensor) -> Window:
        """Some of the frames."""
        return Window(*(part[chosen] for part in self))


def spread(count: int, most: int) -> torch.Tensor:
    """At most ``most`` of ``count`` positions, evenly spread, ``[n]``."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def window(mask: torch.Tensor) -> Window:
    """Cuts masks ``[n, height, width]``, none empty, to windows of one size within the frame."""
    rows, columns = _interval(mask.any(2)), _interval(mask.any(1))
    rows, columns = rows[:, :, None], columns[:, None, :]
    return Window(mask[torch.arange(len(mask))[:, None, None], rows, columns], rows, columns)


def rank_shapes(view: Window) -> list[tuple[float, str]]:
    """Mean intersection over union of masks with every shape and with :data:`DIAMOND`, best first."""
    chosen, shapes = view.pick(spread(len(view.mask), SHAPE_FRAMES)), (*SHAPES, DIAMOND)
    return sorted(((float(fit_shape(chosen, shape).overlap.mean()), shape) for shape in shapes), reverse=True)


def is_clear(ranks: list[tuple[float, str]]) -> bool:
    """Whether the best shape is one of the world's and fits, better than the next."""
    (best, shape), (next_best, _) = ranks[:2]
    return shape in SHAPES and best >= LEAST_OVERLAP and best - next_best >= CLEAR


def fit_shape(view: Window, shape: str, rounds: int = 8) -> Fit:
    """Moves and scales a shape until its area and centroid within the frame equal those of the mask.

    Comparing what both show within the frame makes the fit right for shapes cut by the frame's edge.

    Args:
        view: masks.
        shape: a word of ``SHAPES``, or :data:`DIAMOND`.
        rounds: corrections; the first one is exact for a shape that is not cut.
    """
    area, centroid = moments(view.mask.float())
    corner = torch.stack([view.columns[:, 0, 0], view.rows[:, 0, 0]], 1)
    centers, radius = centroid + corner, (area / math.pi).sqrt()
    for _ in range(rounds):
        drawn_area, drawn_centroid = moments(draw(shape, centers, radius, view.rows, view.columns))
        shown = (drawn_area / (math.pi * radius.square())).clamp(0.5, 1)
        centers = centers + (centroid - drawn_centroid) / shown[:, None]  # the rest of a cut shape hides the step
        radius = radius * (area / drawn_area.clamp_min(1)).pow(0.5 / shown).clamp(0.7, 1.4)
    drawn = draw(shape, centers, radius, view.rows, view.columns) > 0.5
    common, either = (drawn & view.mask).sum((1, 2)), (drawn | view.mask).sum((1, 2))
    return Fit(centers, radius, common / either)


def draw(
    shape: str, centers: torch.Tensor, radius: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Anti-aliased coverage ``[n, height, width]`` of a shape, as ``render`` draws it; of :data:`DIAMOND` too."""
    x = columns + 0.5 - centers[:, 0, None, None]
    y = rows + 0.5 - centers[:, 1, None, None]
    if shape == DIAMOND:
        shape, x, y = "square", (x + y) * math.sqrt(0.5), (y - x) * math.sqrt(0.5)
    return (0.5 - signed_distance(shape, x, y, radius[:, None, None])).clamp(0, 1)


def name_size(radius: float) -> str | None:
    """The word for a radius, given as a fraction of the shorter side; None if it is far below or above them all.

    Between two words the middle of the gap decides; the outermost words reach half their width further.
    """
    words = sorted(SIZES, key=lambda word: SIZES[word])
    lowest, highest = SIZES[words[0]][0], SIZES[words[-1]][1]
    if not 0.6 * lowest <= radius <= 1.4 * highest:
        return None
    limits = [(SIZES[low][1] + SIZES[high][0]) / 2 for low, high in itertools.pairwise(words)]
    return words[sum(radius > limit for limit in limits)]


def _interval(used: torch.Tensor) -> torch.Tensor:
    """Row numbers ``[n, size]`` of windows that hold all used rows of ``[n, height]`` and a margin."""
    height = used.shape[1]
    numbers = torch.arange(height)
    first = torch.where(used, numbers, height).min(1).values
    last = torch.where(used, numbers, -1).max(1).values
    extent = int((last - first).max()) + 1
    size = min(height, extent + 2 * (3 + round(MARGIN * extent)))
    start = ((first + last + 1 - size).float() / 2).round().long().clamp(0, height - size)
    return start[:, None] + torch.arange(size)
