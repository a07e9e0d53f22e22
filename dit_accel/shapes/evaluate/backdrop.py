"""Reads the background: one color, or a straight run from top to bottom."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from ..world import BACKGROUNDS, RGB, backdrop

NEAR = 0.1  # RGB distance within which a row belongs to the background
UNIFORM = 0.25  # RGB distance within which a pixel does; also the farthest a background is from its word
GRADIENT, PLAIN = 0.6, 0.4  # share of the world's rise above which, and below which, it is one
BANDS = 8  # bands of rows that propose lines


class Backdrop(NamedTuple):
    """The empty background, as far as a straight line from top to bottom describes it.

    Attributes:
        middle: RGB half-way down, ``[3]``.
        rise: RGB at the bottom edge less that at the top edge, ``[3]``.
    """

    middle: torch.Tensor
    rise: torch.Tensor

    def rows(self, height: int) -> torch.Tensor:
        """RGB of every row, ``[3, height]``."""
        return self.middle[:, None] + self.rise[:, None] * _down(height)


def fit_backdrop(video: torch.Tensor) -> Backdrop | None:
    """Fits a line to the rows' median colors, or None if most of the clip is not near any.

    Objects cover less than half of most rows, so the median of a row is the background. Of the lines through two
    bands of rows the one nearest to all rows wins; the rows near it give the fit.

    Args:
        video: ``[frames, 3, height, width]``.
    """
    height = video.shape[2]
    rows = video.permute(1, 2, 0, 3).flatten(2).median(2).values
    down = _down(height)
    proposals = torch.stack(_proposals(rows, down))  # [n, 3, 2]
    lines = proposals[..., :1] + proposals[..., 1:] * down
    best = int((lines - rows).norm(dim=1).clamp_max(NEAR).sum(1).argmin())
    near = (lines[best] - rows).norm(dim=0) < NEAR
    fit = _line(rows[:, near], down[near])
    found = Backdrop(fit[:, 0], fit[:, 1])
    share = ((video - found.rows(height)[:, :, None]).norm(dim=1) < UNIFORM).float().mean()
    return found if float(share) > 0.5 else None


def name_backdrop(found: Backdrop) -> tuple[str | None, bool | None]:
    """The background's word and whether it is a gradient; None where the fit does not decide it."""
    words: dict[bool, list[Backdrop]] = {
        gradient: [Backdrop(*_ends(backdrop(word, gradient, 2, 1))) for word in BACKGROUNDS]
        for gradient in (False, True)
    }
    rise = words[True][0].rise
    share = float(found.rise @ rise / (rise @ rise))
    slanted = (found.rise - share * rise).norm() > NEAR  # another color at the bottom than at the top
    gradient = None if slanted or PLAIN < share < GRADIENT or share < -PLAIN else share >= GRADIENT
    candidates = words[share > (PLAIN + GRADIENT) / 2]
    distances = torch.stack([(found.middle - candidate.middle).norm() for candidate in candidates])
    index = int(distances.argmin())
    return (list(BACKGROUNDS)[index] if float(distances[index]) <= UNIFORM else None), gradient


def rgb(value: torch.Tensor) -> RGB:
    """Three numbers out of a tensor."""
    red, green, blue = value.tolist()
    return red, green, blue


def _down(height: int) -> torch.Tensor:
    """Position of every row between the top edge (-0.5) and the bottom edge (0.5)."""
    return (torch.arange(height) + 0.5) / height - 0.5


def _proposals(rows: torch.Tensor, down: torch.Tensor) -> list[torch.Tensor]:
    colors = [band.median(1).values for band in rows.chunk(BANDS, 1)]
    places = [band.mean() for band in down.chunk(BANDS)]
    flat = [torch.stack([color, torch.zeros(3)], 1) for color in colors]
    sloped = []
    for (first, y1), (second, y2) in itertools.combinations(zip(colors, places, strict=True), 2):
        slope = (second - first) / (y2 - y1)
        sloped.append(torch.stack([first - slope * y1, slope], 1))
    return flat + sloped


def _line(colors: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Least-squares offset and slope of every channel, ``[3, 2]``."""
    design = torch.stack([torch.ones_like(down), down], 1)
    return torch.linalg.lstsq(design, colors.T).solution.T


def _ends(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle and rise of a background drawn with two rows, ``[3, 2, 1]``, which are half a height apart."""
    return drawn.mean((1, 2)), 2 * (drawn[:, 1, 0] - drawn[:, 0, 0])
