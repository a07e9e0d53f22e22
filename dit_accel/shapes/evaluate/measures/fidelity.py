"""How far a video is from what is known: its source, its backdrop, or the scene drawn anew."""

from __future__ import annotations

import torch

from ....metrics import psnr
from ....metrics.checks import check_values
from ....metrics.structure import WINDOW, plane_ssim
from ..observation import observe
from ..redraw import redraw
from . import regions


def outside_psnr(video: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, margin: int = 4) -> float:
    """PSNR in dB outside a mask: whether an edit left the rest alone.

    Args:
        video: the edited video.
        reference: the source, of the same shape.
        mask: what may change: the object before and after (pass both as two objects).
        margin: pixels.

    Raises:
        ValueError: if shapes do not fit, values are outside [0, 1], or the mask leaves nothing.
    """
    outside = regions.outside(video, mask, margin)
    return psnr(regions.pixels(video, outside), regions.pixels(reference, outside))


def outside_ssim(video: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, margin: int = 4) -> float:
    """Structural similarity outside a mask: the mean of :func:`dit_accel.metrics.ssim`'s map over those pixels.

    What is inside is taken from the reference on both sides, so that windows that reach into it see no difference.

    Args:
        video: the edited video; height and width at least 6.
        reference: the source, of the same shape.
        mask: what may change.
        margin: pixels.

    Raises:
        ValueError: as :func:`outside_psnr`.
    """
    outside = regions.outside(video, mask, margin)
    if reference.shape != video.shape or min(video.shape[-2:]) <= WINDOW // 2:
        raise ValueError(
            f"outside_ssim needs two videos of one shape, of at least {WINDOW // 2 + 1} x {WINDOW // 2 + 1} pixels;"
            f" got {list(video.shape)} and {list(reference.shape)}"
        )
    check_values(reference)
    planes = (x.flatten(0, 1)[:, None] for x in (torch.where(outside[:, None], video, reference), reference))
    return float(plane_ssim(*planes).view_as(video).mean(1)[outside].mean())


def hole_psnr(video: torch.Tensor, backdrop: torch.Tensor, mask: torch.Tensor) -> float:
    """PSNR in dB inside a mask against the known background: how well a removed object's place was filled.

    Args:
        video: the edited video.
        backdrop: ``[3, height, width]`` (:class:`~dit_accel.shapes.world.Clip` has it), or of every frame.
        mask: the place.

    Raises:
        ValueError: if shapes do not fit, values are outside [0, 1], or the mask is empty.
    """
    inside = regions.inside(video, mask)
    truth = backdrop.expand(video.shape) if backdrop.shape == video.shape[1:] else backdrop
    return psnr(regions.pixels(video, inside), regions.pixels(truth, inside))


def synthesis_psnr(video: torch.Tensor) -> float:
    """PSNR in dB against the scene drawn anew with what was read off the video: whether it looks like this world.

    See :func:`.redraw` for what is drawn. A video without an even background is compared with its mean color.

    Raises:
        ValueError: as :func:`.observe`, and for values outside [0, 1].
    """
    seen, frames = observe(video), video.detach().float().cpu()
    drawn = frames.mean((0, 2, 3), keepdim=True)
    if seen.background_rgb is not None:
        drawn = redraw(seen, *frames.shape[-2:])
    return psnr(frames, drawn.clamp(0, 1).expand_as(frames))
