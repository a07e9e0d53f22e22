"""Reads a shapes clip back into words, without a neural network: its colour, shape, motion and background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .fit import LEAST_OVERLAP, best_shape, direction, draw, fit_shape
from .foreground import Foreground, border_color, find_foreground
from .world import BACKGROUNDS, COLORS, Attributes

WORKING_SIDE = 128  # frames are averaged down by a whole factor while their shorter side stays at least this
COLOR_TOLERANCE = 0.45  # RGB distance; the palette's colours are at least 0.7 apart
BACKGROUND_TOLERANCE = 0.25  # RGB distance; the backgrounds are at least 0.46 apart

RGB = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Observation:
    """What a clip shows; a word is None where the clip does not decide it.

    Attributes:
        color: word of ``COLORS``.
        shape: word of ``SHAPES``.
        motion: word of ``MOTIONS``.
        background: word of ``BACKGROUNDS``.
        centers: ``[frames, 2]`` (x, y) of the shape in pixels; NaN where a frame shows none.
        areas: ``[frames]`` share of the frame covered; 0 where a frame shows none.
        color_rgb: median of the shape's pixels away from its edge.
        background_rgb: median of the border pixels.
        overlap: mean intersection over union with the best outline, in [0, 1].
        residual: root mean square difference from the scene drawn anew with the words and places read, in [0, 1].
    """

    color: str | None
    shape: str | None
    motion: str | None
    background: str | None
    centers: torch.Tensor
    areas: torch.Tensor
    color_rgb: RGB | None = None
    background_rgb: RGB | None = None
    overlap: float | None = None
    residual: float | None = None


class Score(NamedTuple):
    """Which words of a prompt a clip shows."""

    color: bool
    shape: bool
    motion: bool
    background: bool

    @property
    def all(self) -> bool:
        """Whether every word is right."""
        return all(self)


def score(video: torch.Tensor, attributes: Attributes) -> Score:
    """Observes a clip (see :func:`observe`) and compares it with the words of its prompt."""
    return judge(observe(video), attributes)


def judge(observation: Observation, attributes: Attributes) -> Score:
    """Compares an observation with the words of a prompt; an undecided word is wrong."""
    return Score(*(getattr(observation, slot) == word for slot, word in attributes._asdict().items()))


def observe(video: torch.Tensor) -> Observation:
    """Reads the words, places and sizes off a clip.

    Frames that show no shape, or no single one, are ignored; if that is most of them, only the background is read.

    Args:
        video: ``[frames, 3, height, width]`` floating point in [0, 1], on any device.

    Raises:
        ValueError: if the video has another layout, dtype or range.
    """
    _check(video)
    factor = max(1, min(video.shape[-2:]) // WORKING_SIDE)
    small = F.avg_pool2d(video.detach().float().cpu(), factor)
    backdrop = border_color(small)
    foreground = None if backdrop is None else find_foreground(small, backdrop)
    if backdrop is None or foreground is None or float(foreground.valid.float().mean()) <= 0.5:
        return _nothing(len(video), backdrop)
    return _read(small, backdrop, foreground, factor)


def nearest(rgb: torch.Tensor, palette: dict[str, RGB], tolerance: float) -> str | None:
    """The palette's word for a colour, or None if it is farther than ``tolerance`` from all of them."""
    distances = (torch.tensor(list(palette.values())) - rgb).norm(dim=1)
    index = int(distances.argmin())
    return list(palette)[index] if float(distances[index]) <= tolerance else None


def _read(small: torch.Tensor, backdrop: torch.Tensor, foreground: Foreground, factor: int) -> Observation:
    valid, (frames, _, height, width) = foreground.valid, small.shape
    mask = foreground.mask[valid]
    shape, overlap = best_shape(mask)
    fit = fit_shape(mask, shape)
    centers = torch.full((frames, 2), float("nan"))
    centers[valid] = fit.centers * factor
    times = valid.nonzero()[:, 0].float()
    color = nearest(foreground.color, COLORS, COLOR_TOLERANCE)
    background = nearest(backdrop, BACKGROUNDS, BACKGROUND_TOLERANCE)
    residual = None
    if color and background:
        drawn = draw(shape, fit.centers, fit.radius, height, width)[:, None]
        behind, front = (torch.tensor(rgb).view(1, 3, 1, 1) for rgb in (BACKGROUNDS[background], COLORS[color]))
        residual = float((small[valid] - behind - drawn * (front - behind)).square().mean().sqrt())
    return Observation(
        color=color,
        shape=shape if overlap >= LEAST_OVERLAP else None,
        motion=direction(times, fit.centers, frames - 1, height, width),
        background=background,
        centers=centers,
        areas=foreground.mask.flatten(1).float().mean(1),
        color_rgb=_rgb(foreground.color),
        background_rgb=_rgb(backdrop),
        overlap=overlap,
        residual=residual,
    )


def _nothing(frames: int, backdrop: torch.Tensor | None) -> Observation:
    return Observation(
        color=None,
        shape=None,
        motion=None,
        background=None if backdrop is None else nearest(backdrop, BACKGROUNDS, BACKGROUND_TOLERANCE),
        centers=torch.full((frames, 2), float("nan")),
        areas=torch.zeros(frames),
        background_rgb=None if backdrop is None else _rgb(backdrop),
    )


def _rgb(value: torch.Tensor) -> RGB:
    red, green, blue = value.tolist()
    return red, green, blue


def _check(video: torch.Tensor) -> None:
    if video.ndim != 4 or video.shape[1] != 3 or not len(video):
        raise ValueError(
            f"expected a video [frames, 3, height, width] with at least one frame, got {list(video.shape)};"
            " permute it (diffusers' output_type='pt' gives [batch, frames, 3, height, width], so pass frames[0])"
        )
    if not video.is_floating_point():
        raise ValueError(f"expected floating point values in [0, 1], got {video.dtype}; divide 8-bit values by 255")
    low, high = float(video.detach().min()), float(video.detach().max())
    if not (low >= -0.5 and high <= 1.5):  # also catches NaN; noise may overshoot the range a little
        raise ValueError(f"expected values in [0, 1], got {low:.3g} to {high:.3g}; map [-1, 1] by video / 2 + 0.5")
