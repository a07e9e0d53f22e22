"""The copy of a clip that the evaluator works on, and small tools for masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

WORKING_SIDE = 128  # pixels; a small object then has a radius of 10, and a stripe of it is 4 high


def working_copy(video: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Brings the shorter side near ``WORKING_SIDE``: frames are averaged down or interpolated up by a whole factor.

    Args:
        video: ``[frames, 3, height, width]`` floating point, on any device.

    Returns:
        The copy, float32 on the CPU, and how many pixels of the video one of its pixels is wide.
    """
    frames, side = video.detach().float().cpu(), min(video.shape[-2:])
    if side < WORKING_SIDE:
        factor = -(-WORKING_SIDE // side)
        return F.interpolate(frames, scale_factor=factor, mode="bilinear"), 1 / factor
    factor = side // WORKING_SIDE
    return F.avg_pool2d(frames, factor), float(factor)


def check_video(video: torch.Tensor) -> None:
    """Refuses what is no clip.

    Raises:
        ValueError: if the video has another layout, dtype or range.
    """
    if video.ndim != 4 or video.shape[1] != 3 or not video.numel():
        raise ValueError(
            f"expected a video [frames, 3, height, width] with at least one frame, got {list(video.shape)};"
            " permute it (diffusers' output_type='pt' gives [batch, frames, 3, height, width], so pass frames[0])"
        )
    if not video.is_floating_point():
        raise ValueError(f"expected floating point values in [0, 1], got {video.dtype}; divide 8-bit values by 255")
    low, high = float(video.detach().min()), float(video.detach().max())
    if not (low >= -0.5 and high <= 1.5):  # also catches NaN; noise may overshoot the range a little
        raise ValueError(f"expected values in [0, 1], got {low:.3g} to {high:.3g}; map [-1, 1] by video / 2 + 0.5")


def dilate(mask: torch.Tensor, reach: int) -> torch.Tensor:
    """Grows ``[..., height, width]`` bool masks by a square of ``2 * reach + 1`` pixels."""
    planes, side = mask.float().reshape(-1, 1, *mask.shape[-2:]), 2 * reach + 1
    planes = F.max_pool2d(planes, (1, side), stride=1, padding=(0, reach))  # one axis at a time is cheaper
    return (F.max_pool2d(planes, (side, 1), stride=1, padding=(reach, 0)) > 0).view_as(mask)


def erode(mask: torch.Tensor, reach: int) -> torch.Tensor:
    """Shrinks masks likewise, also from the edges of the frame."""
    empty = F.pad(~mask, (reach,) * 4, value=True)
    return ~dilate(empty, reach)[..., reach : reach + mask.shape[-2], reach : reach + mask.shape[-1]]


def moments(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Area ``[n]`` and centroid (x, y) ``[n, 2]`` of soft masks ``[n, height, width]``, in pixels."""
    rows, columns = mask.sum(2), mask.sum(1)
    area = rows.sum(1)
    x = columns @ (torch.arange(mask.shape[2]) + 0.5)
    y = rows @ (torch.arange(mask.shape[1]) + 0.5)
    return area, torch.stack([x, y], 1) / area.clamp_min(1e-6)[:, None]
