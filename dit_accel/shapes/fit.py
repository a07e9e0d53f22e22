"""Fits the outlines of the shapes world to masks, and straight motion to positions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .world import MOTIONS, SHAPES, signed_distance

LEAST_OVERLAP = 0.75  # intersection over union below which a mask is no shape of the world
LEAST_TRAVEL = 0.08  # of the side moved along; the world moves 0.30 to 0.50
MOST_SLANT = 0.75  # sideways travel, as a share of the travel along the main axis
SHAPE_FRAMES = 9  # frames that decide which shape it is


class Fit(NamedTuple):
    """One shape fitted to masks.

    Attributes:
        centers: ``[frames, 2]`` (x, y) in pixels, of the whole shape where the frame's edge cuts it.
        radius: ``[frames]`` pixels.
        overlap: ``[frames]`` intersection over union of mask and fit.
    """

    centers: torch.Tensor
    radius: torch.Tensor
    overlap: torch.Tensor


def best_shape(mask: torch.Tensor) -> tuple[str, float]:
    """The shape that overlaps ``[frames, height, width]`` masks most, and its mean intersection over union."""
    chosen = torch.linspace(0, len(mask) - 1, min(SHAPE_FRAMES, len(mask))).round().long()
    overlaps = {shape: float(fit_shape(mask[chosen], shape).overlap.mean()) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    return shape, overlaps[shape]


def fit_shape(mask: torch.Tensor, shape: str, rounds: int = 6) -> Fit:
    """Moves and scales a shape until its area and centroid within the frame equal those of the mask.

    Comparing what both show within the frame makes the fit right for shapes cut by the frame's edge.

    Args:
        mask: ``[frames, height, width]`` bool; no frame may be empty.
        shape: a word of ``SHAPES``.
        rounds: corrections; the first one is exact for a shape that is not cut.
    """
    area, centroid = _moments(mask.float())
    centers, radius = centroid, (area / math.pi).sqrt()
    for _ in range(rounds):
        drawn_area, drawn_centroid = _moments(draw(shape, centers, radius, *mask.shape[1:]))
        centers = centers + centroid - drawn_centroid
        radius = radius * (area / drawn_area.clamp_min(1)).sqrt().clamp(0.7, 1.4)
    drawn = draw(shape, centers, radius, *mask.shape[1:]) > 0.5
    common, either = (drawn & mask).sum((1, 2)), (drawn | mask).sum((1, 2))
    return Fit(centers, radius, common / either)


def draw(shape: str, centers: torch.Tensor, radius: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Anti-aliased coverage ``[frames, height, width]`` of a shape, as ``render`` draws it."""
    scale = radius[:, None, None]
    x = (torch.arange(width) + 0.5)[None, None, :] - centers[:, 0, None, None]
    y = (torch.arange(height) + 0.5)[None, :, None] - centers[:, 1, None, None]
    return (0.5 - scale * signed_distance(shape, x / scale, y / scale, 1.0)).clamp(0, 1)


def direction(times: torch.Tensor, centers: torch.Tensor, span: int, height: int, width: int) -> str | None:
    """The word for the motion of a straight track, or None for too little motion or a slanted one.

    The slope is the median over all pairs of frames (Theil-Sen), so a few bad frames do not turn it.

    Args:
        times: ``[n]`` frame numbers.
        centers: ``[n, 2]`` (x, y) in pixels.
        span: frame steps of the whole clip.
        height: of the frame, in pixels.
        width: of the frame, in pixels.
    """
    if len(times) < 2:
        return None
    first, second = torch.triu_indices(len(times), len(times), offset=1)
    slopes = (centers[second] - centers[first]) / (times[second] - times[first])[:, None]
    travel = slopes.median(0).values * span
    axis = int(travel.abs().argmax())
    along, across = float(travel[axis].abs()), float(travel[1 - axis].abs())
    if along < LEAST_TRAVEL * (width, height)[axis] or across > MOST_SLANT * along:
        return None
    step = [0, 0]
    step[axis] = 1 if travel[axis] > 0 else -1
    return next(word for word, move in MOTIONS.items() if list(move) == step)


def _moments(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Area ``[frames]`` and centroid ``[frames, 2]`` of soft masks."""
    rows, columns = mask.sum(2), mask.sum(1)
    area = rows.sum(1)
    x = columns @ (torch.arange(mask.shape[2]) + 0.5)
    y = rows @ (torch.arange(mask.shape[1]) + 0.5)
    return area, torch.stack([x, y], 1) / area.clamp_min(1e-6)[:, None]
