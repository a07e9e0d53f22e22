"""Pixels inside and outside of masks."""

from __future__ import annotations

import torch

from ....metrics.checks import check_frames, check_values
from ..working import dilate
from .places import as_mask


def joined(video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """All objects' masks as one, ``[frames, height, width]`` bool on the video's device."""
    check_frames(video, 1, "a truth measure")
    check_values(video)
    planes = as_mask(mask)
    if planes.shape[0] != len(video) or planes.shape[2:] != video.shape[2:]:
        raise ValueError(f"the mask {list(mask.shape)} does not fit the video {list(video.shape)}")
    return planes.any(1).to(video.device)


def inside(video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As :func:`joined`, with at least one pixel."""
    return some(joined(video, mask), "the mask is empty")


def outside(video: torch.Tensor, mask: torch.Tensor, margin: int) -> torch.Tensor:
    """The pixels more than ``margin`` away from :func:`joined`, at least one."""
    return some(~dilate(joined(video, mask), margin), "the mask leaves nothing outside")


def some(region: torch.Tensor, otherwise: str) -> torch.Tensor:
    """The region, if it holds a pixel; ValueError otherwise."""
    if not region.any():
        raise ValueError(f"nothing to measure: {otherwise}; check the mask and the margin")
    return region


def pixels(video: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Colors ``[n, 3]`` of a region ``[frames, height, width]``."""
    if video.shape != (len(region), 3, *region.shape[1:]):
        raise ValueError(f"expected a video like the mask {list(region.shape)}, got {list(video.shape)}")
    return video.movedim(1, -1)[region]
