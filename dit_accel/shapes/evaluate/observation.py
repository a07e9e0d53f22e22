"""Reads a clip or an image of the shapes world back into words, without a neural network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..world import RGB, SHAPES
from .backdrop import Backdrop, fit_backdrop, name_backdrop, rgb
from .motion import name_motion
from .outline import fit_shape, is_clear, name_size, rank_shapes, spread, window
from .pieces import find_pieces
from .redraw import redraw
from .texture import read_surface
from .tracks import Track, find_tracks
from .working import check_video, working_copy

MOST_OBJECTS = 3
TEXTURE_FRAMES = 9  # frames that decide texture and color


@dataclass(frozen=True, eq=False)
class ObservedObject:
    """One object of a clip; a word is None where the clip does not decide it.

    Attributes:
        color: word of ``COLORS``.
        shape: word of ``SHAPES``.
        size: word of ``SIZES``.
        texture: word of ``TEXTURES``.
        motion: word of ``MOTIONS``; always None for an image.
        centers: ``[frames, 2]`` (x, y) of the whole shape in pixels; NaN where a frame does not show it.
        radius: ``[frames]`` in pixels, of the circle with about the same area; NaN likewise.
        overlap: mean intersection over union with the best outline, in [0, 1].
        color_rgb: median of its pixels away from the edge; of stripes and checks, of their darker half.
    """

    color: str | None
    shape: str | None
    size: str | None
    texture: str | None
    motion: str | None
    centers: torch.Tensor
    radius: torch.Tensor
    overlap: float
    color_rgb: RGB


@dataclass(frozen=True, eq=False)
class Observation:
    """What a clip shows; a word is None where the clip does not decide it.

    Attributes:
        objects: what more than half of the frames show, largest first, at most three.
        count: how many such objects there are; may exceed three.
        background: word of ``BACKGROUNDS``.
        gradient: whether it runs from darker (top) to lighter (bottom).
        background_rgb: its color half-way down; None if there is no even background, and then nothing is read.
        residual: root mean square difference from the scene drawn anew with what was read (see :func:`.redraw`), in
            [0, 1]; None without a background.
    """

    objects: tuple[ObservedObject, ...]
    count: int
    background: str | None
    gradient: bool | None
    background_rgb: RGB | None = None
    residual: float | None = None


def observe(video: torch.Tensor) -> Observation:
    """Reads objects and background off a clip or, if it has one frame, an image.

    The background is a line fitted to the rows' median colors; what differs from it is cut into connected pieces where
    hues meet, and pieces are followed through the frames. Of each object, the outline, texture and track are fitted.

    Args:
        video: ``[frames, 3, height, width]`` floating point in [0, 1], on any device.

    Raises:
        ValueError: if the video has another layout, dtype or range.
    """
    check_video(video)
    small, scale = working_copy(video)
    found = fit_backdrop(small)
    if found is None:
        return Observation((), 0, None, None)
    background, gradient = name_backdrop(found)
    objects = _find_objects(small, found, scale, video.shape[-2:])
    seen = Observation(tuple(objects[:MOST_OBJECTS]), len(objects), background, gradient, rgb(found.middle))
    drawn = redraw(seen, small.shape[2], small.shape[3], scale)
    return replace(seen, residual=float((drawn - small).square().mean().sqrt()))


def _find_objects(small: torch.Tensor, found: Backdrop, scale: float, size: torch.Size) -> list[ObservedObject]:
    height, width = small.shape[-2:]
    tracks = find_tracks(find_pieces(small, found.rows(height)), height, width)
    objects = [_read(small, track, scale, size) for track in tracks]
    return sorted(objects, key=lambda item: -float(item.radius.nanmedian()))


def _read(small: torch.Tensor, track: Track, scale: float, size: torch.Size) -> ObservedObject:
    times = torch.tensor(track.frames)
    view = window(torch.stack([piece.mask for piece in track.pieces]))
    ranks = rank_shapes(view)
    overlap, shape = next(rank for rank in ranks if rank[1] in SHAPES)
    fit = fit_shape(view, shape)
    some = spread(len(times), TEXTURE_FRAMES)
    part = view.pick(some)
    surface = read_surface(part.cut(small, times[some]), part, fit.pick(some), track.hue)
    centers, radius = torch.full((len(small), 2), torch.nan), torch.full((len(small),), torch.nan)
    centers[times], radius[times] = fit.centers * scale, fit.radius * scale
    return ObservedObject(
        color=surface.color,
        shape=shape if is_clear(ranks) else None,
        size=name_size(float(radius.nanmedian()) / min(size)),
        texture=surface.texture,
        motion=name_motion(times.float(), centers[times], len(small) - 1, *size),
        centers=centers,
        radius=radius,
        overlap=overlap,
        color_rgb=surface.rgb,
    )
