"""Finds what is not background, in connected pieces."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..world import COLORS, SIZES, second_color
from .working import dilate, erode, moments

THRESHOLD = 0.18  # RGB distance from the background that is not noise; the palest band is 0.29 apart
COLORLESS = 0.08  # length of the hue vector below which a pixel has none; the palest band has 0.17
FAINT = 0.35  # RGB distance from the background below which all of a hue is a trail or a stain; objects have 0.55
TRAIL = 0.3  # of an object's difference from the background; what differs less is its trail. The palest band has 0.34
SEAM = 0.25  # RGB distance across a border of two hues that parts two objects; blurred objects have 0.35
LEAST_RADIUS = 0.55 * SIZES["small"][0]  # of the shorter side; what covers less than such a circle is dirt
MOST_PIECES = 6  # of one hue in one frame


class Piece(NamedTuple):
    """One connected piece in one frame.

    Attributes:
        center: centroid (x, y) in pixels.
        area: in pixels.
        mask: ``[height, width]`` bool.
        hue: the color word of most of it, or None for black, white and gray.
    """

    center: tuple[float, float]
    area: float
    mask: torch.Tensor
    hue: str | None


def find_pieces(video: torch.Tensor, empty: torch.Tensor) -> list[list[Piece]]:
    """The pieces of every frame: what is not background, connected, and of one hue or drifting from one to another.

    Args:
        video: ``[frames, 3, height, width]``.
        empty: the background, ``[3, height]``.
    """
    difference = video - empty[:, :, None]
    distance = difference.norm(dim=1)
    hues = nearest_hue(difference, empty.mean(1)).masked_fill(distance <= THRESHOLD, -1)
    least = LEAST_RADIUS**2 * torch.pi * min(video.shape[-2:]) ** 2
    found: list[list[Piece]] = [[] for _ in video]
    for index, hue in enumerate([*COLORS, None]):
        rough = hues == index
        if int(rough.sum((1, 2)).max()) < least / 4:
            continue
        for frame, masks in enumerate(split(_cut_half_way(rough, distance), least / 4)):
            found[frame] += [_piece(mask, hue) for mask in masks]
    merged = (_merge_drifting(frame, pieces) for frame, pieces in zip(video, found, strict=True))
    return [[piece for piece in pieces if piece.area >= least] for pieces in merged]


def nearest_hue(difference: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Index of the color word with the nearest hue, ``[frames, height, width]``; ``len(COLORS)`` where there is none.

    A hue is the direction in which a color lies from the background, seen along the gray axis: edges and trails, which
    mix an object with the background, keep it. From brown, a color and its light half lie in two directions.

    Args:
        difference: RGB less the background, ``[frames, 3, height, width]``.
        empty: RGB of the background, ``[3]``; its own gray does not matter.
    """
    palette = torch.tensor([color for word in COLORS for color in (COLORS[word], second_color(word))]) - empty
    directions = F.normalize(palette - palette.mean(1, keepdim=True), dim=1)  # so a pixel's own gray drops out
    share, index = torch.einsum("kc,fchw->fkhw", directions, difference).max(1)
    return (index // 2).masked_fill(share < COLORLESS, len(COLORS))


def split(mask: torch.Tensor, least: float) -> list[list[torch.Tensor]]:
    """Masks of the connected pieces of every frame of ``[frames, height, width]`` with at least ``least`` pixels.

    Pieces are told apart on a grid of 2 x 2 cells, which costs a quarter, after thin lines and specks are gone.
    """
    solid = dilate(erode(mask, 1), 1) & mask
    labels = label_pieces(F.avg_pool2d(solid[:, None].float(), 2, ceil_mode=True)[:, 0] >= 0.5)
    sizes = torch.zeros(len(mask), labels[0].numel() + 1, dtype=torch.long)
    sizes.scatter_add_(1, labels.flatten(1), torch.ones_like(labels.flatten(1)))
    sizes[:, 0] = 0  # label 0 is no piece
    counts, chosen = sizes.topk(MOST_PIECES, 1)
    found: list[list[torch.Tensor]] = [[] for _ in mask]
    for rank in range(MOST_PIECES):
        frames = (4 * counts[:, rank] >= 0.5 * least).nonzero()[:, 0]  # an edge may cost a small piece many cells
        if not len(frames):
            break
        cells = dilate(labels[frames] == chosen[frames, rank, None, None], 1)
        near = F.interpolate(cells[:, None].float(), scale_factor=2)[:, 0, : mask.shape[1], : mask.shape[2]] > 0
        for frame, piece in zip(frames.tolist(), mask[frames] & near, strict=True):
            if int(piece.sum()) >= least:
                found[frame].append(piece)
    return found


def _merge_drifting(frame: torch.Tensor, pieces: list[Piece]) -> list[Piece]:
    """Joins pieces that touch and have nearly one color there: an object whose hue drifts, not two objects."""
    pieces = sorted(pieces, key=lambda piece: -piece.area)
    for first, second in itertools.combinations(pieces, 2):
        if _touch_alike(frame, first, second):
            rest = [piece for piece in pieces if piece is not first and piece is not second]
            return _merge_drifting(frame, [_piece(first.mask | second.mask, first.hue), *rest])
    return pieces


def _touch_alike(frame: torch.Tensor, first: Piece, second: Piece) -> bool:
    apart = math.dist(first.center, second.center)
    if first.hue == second.hue or apart > 2 * (math.sqrt(first.area) + math.sqrt(second.area)):
        return False
    borders = [dilate(one.mask, 2) & other.mask for one, other in ((first, second), (second, first))]
    if not all(border.any() for border in borders):
        return False
    colors = [frame[:, border].mean(1) for border in borders]
    return float((colors[0] - colors[1]).norm()) < SEAM


def _piece(mask: torch.Tensor, hue: str | None) -> Piece:
    area, center = moments(mask[None].float())
    x, y = center[0].tolist()
    return Piece((x, y), float(area), mask, hue)


def label_pieces(mask: torch.Tensor) -> torch.Tensor:
    """Labels 8-connected pieces of ``[frames, height, width]`` bool with positive integers, background 0.

    The highest label spreads from pixel to pixel until nothing changes.
    """
    start = torch.arange(1, mask[0].numel() + 1, dtype=torch.float64).view(1, *mask.shape[1:])
    labels = start * mask
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _cut_half_way(rough: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Moves the outline half-way between background and inside, where blur does not shift it and trails are cut off.

    Of stripes and checks, the ones nearer to the background count: they cover more than a quarter.
    """
    inside = distance[erode(rough, 2)]
    inside = inside[:: max(1, len(inside) // 20_000)]
    full = float(inside.quantile(0.9)) if len(inside) else 0.0
    if full < FAINT:
        return torch.zeros_like(rough)
    return rough & (distance > 0.5 * inside[inside > TRAIL * full].quantile(0.25))
