"""Finds a place for an object where it keeps clear of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .motion import paths
from .outline import reach
from .scene import SceneObject

GAP = 0.03  # least distance between two objects, as a fraction of the shorter side
MOMENTS = 65  # times of a clip at which they must keep it; no orbit goes further than the gap between two of them


def first_apart(candidates: Sequence[SceneObject], placed: Sequence[SceneObject]) -> SceneObject | None:
    """The first candidate that touches none of the placed objects throughout a clip, in frames of any size.

    Args:
        candidates: what the same words may stand for.
        placed: objects to keep clear of.
    """
    free = torch.ones(len(candidates), dtype=torch.bool)
    for other in placed:
        free &= _apart(candidates, other)
    return candidates[int(free.int().argmax())] if free.any() else None


def _apart(candidates: Sequence[SceneObject], other: SceneObject) -> torch.Tensor:
    """Whether each candidate keeps clear of another object, ``[candidates]`` bool.

    Frames that are not square stretch straight paths, but not orbits. That takes objects further apart, except where
    the orbits' part of their distance outweighs the straight part and points the other way: then some frame makes
    them pass each other.
    """
    (straight, orbit), (other_straight, other_orbit) = paths(candidates, MOMENTS), paths([other], MOMENTS)
    straight, orbit = other_straight - straight, other_orbit - orbit
    square = straight + orbit
    passing = (straight * orbit < 0) & (orbit.abs() > straight.abs())
    (x, y), (nearest_x, nearest_y) = square.unbind(-1), square.masked_fill(passing, 0.0).unbind(-1)
    size = torch.tensor([item.size for item in candidates], dtype=torch.float64)[:, None]
    own = [size * value for value in reach(candidates[0].words.shape)]
    others = [other.size * value for value in reach(other.words.shape)]
    clear = [_clear(own, others, *distance) for distance in ((x, y), (nearest_x, y), (x, nearest_y))]
    return torch.stack(clear).all(0).all(1)


def _clear(own: Sequence[torch.Tensor], others: Sequence[float], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether the circles or boxes around two objects are apart, for distances (x, y) between their centers."""
    (side, above, below, corner), (other_side, other_above, other_below, other_corner) = own, others
    circles = x.square() + y.square() > (corner + other_corner + GAP) ** 2
    boxes = (x.abs() > side + other_side + GAP) | (y > below + other_above + GAP) | (-y > above + other_below + GAP)
    return circles | boxes
