"""Finds the one shape of a shapes clip: what is not background, in one piece, in every frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

FIRST_THRESHOLD = 0.2  # RGB distance from the background that is not noise; the palettes are 0.55 apart
UNIFORM = 0.25  # RGB distance within which border pixels count as the background
LEAST_AREA, MOST_AREA = 0.004, 0.5  # of the frame; the world draws 0.045 to 0.15 in a square frame
LEAST_SHARE = 0.6  # of all foreground that the largest piece must hold to be called the shape


@dataclass(frozen=True, eq=False)
class Foreground:
    """The shape of every frame.

    Attributes:
        mask: ``[frames, height, width]`` bool.
        valid: ``[frames]`` bool, frames in which one piece stands out; the mask is empty in the others.
        color: median RGB of the shape, away from its edges.
    """

    mask: torch.Tensor
    valid: torch.Tensor
    color: torch.Tensor


def border_color(video: torch.Tensor) -> torch.Tensor | None:
    """Median RGB of the outermost pixels of all frames, ``[3]``; None if most of them are not near it."""
    edges = [video[..., 0, :], video[..., -1, :], video[..., :, 0], video[..., :, -1]]
    pixels = torch.cat(edges, -1).transpose(0, 1).flatten(1)
    median = pixels.median(1).values
    near = (pixels - median[:, None]).norm(dim=0) < UNIFORM
    return median if float(near.float().mean()) > 0.5 else None


def find_foreground(video: torch.Tensor, background: torch.Tensor) -> Foreground | None:
    """Separates the shape from the background.

    A first threshold finds the shape roughly and gives its colour; the second lies half-way between the two colours,
    where blur does not move the outline.

    Args:
        video: ``[frames, 3, height, width]``.
        background: RGB, ``[3]``.

    Returns:
        None if no frame holds a shape.
    """
    distance = (video - background.view(1, 3, 1, 1)).norm(dim=1)
    rough, valid = largest_piece(distance > FIRST_THRESHOLD)
    if not valid.any():
        return None
    contrast = (_inner_color(video, rough) - background).norm()
    mask, valid = largest_piece(distance > 0.5 * contrast)
    if not valid.any():
        return None
    return Foreground(mask, valid, _inner_color(video, mask))


def largest_piece(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the largest connected piece of every frame.

    Pieces are told apart on a grid of 2 x 2 cells, which also drops specks and costs a quarter.

    Returns:
        The mask ``[frames, height, width]`` of the piece, and ``[frames]`` bool: whether it is of credible size and
        holds most of the foreground. It is empty where not.
    """
    cells = F.avg_pool2d(mask[:, None].float(), 2, ceil_mode=True)[:, 0] >= 0.5
    labels = label_pieces(cells).flatten(1)
    sizes = torch.zeros(len(mask), labels.shape[1] + 1, dtype=torch.long)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    sizes[:, 0] = 0  # label 0 is background
    size, label = sizes.max(1)
    chosen = ((labels == label[:, None]) & (label > 0)[:, None]).view_as(cells)
    grown = F.max_pool2d(chosen[:, None].float(), 3, stride=1, padding=1)
    near = F.interpolate(grown, scale_factor=2)[:, 0, : mask.shape[1], : mask.shape[2]] > 0
    piece = mask & near
    area = piece.flatten(1).float().mean(1)
    valid = (area > LEAST_AREA) & (area < MOST_AREA) & (size > LEAST_SHARE * sizes.sum(1))
    return piece & valid[:, None, None], valid


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


def _inner_color(video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    inner = -F.max_pool2d(-mask[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0
    chosen = inner if inner.any() else mask
    return video.transpose(0, 1)[:, chosen].median(1).values
