"""What changes from frame to frame although the truth does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ....metrics.checks import check_frames
from ..working import dilate, erode
from . import regions


def flicker(video: torch.Tensor, mask: torch.Tensor, centers: torch.Tensor | None = None, *, margin: int = 4) -> float:
    """Mean absolute change from frame to frame where the truth has none.

    Without ``centers``: outside the masks of both frames. With them: inside the mask, each frame compared with the
    next one shifted back by the object's known step.

    Args:
        video: at least 2 frames.
        mask: everything that moves; with ``centers``, one object.
        centers: ``[frames, 2]`` (x, y) in pixels, the object's known places.
        margin: pixels by which masks are grown, or with ``centers`` shrunk.

    Raises:
        ValueError: if shapes do not fit, or there is nothing to compare.
    """
    check_frames(video, 2, "flicker")
    moving = regions.joined(video, mask)
    if centers is None:
        still = ~dilate(moving, margin)
        later, region = video[1:], regions.some(still[1:] & still[:-1], "the masks leave nothing outside")
    else:
        if centers.shape != (len(video), 2):
            raise ValueError(f"centers must be [frames, 2] of one object, got {list(centers.shape)}")
        later, known = _shifted(video[1:].float(), centers.diff(dim=0).to(video.device))
        region = regions.some(erode(moving, margin)[:-1] & known, "the shrunk masks are empty")
    return float((later - video[:-1]).abs().mean(1)[region].double().mean())


def _shifted(video: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames looked at from places ``steps`` (x, y) away, and the mask of pixels that the frame knows there."""
    frames, _, height, width = video.shape
    x = torch.arange(width, device=video.device) + steps[:, :1].float()
    y = torch.arange(height, device=video.device) + steps[:, 1:].float()
    grid = torch.stack(
        [
            (2 * x / max(1, width - 1) - 1)[:, None, :].expand(frames, height, width),
            (2 * y / max(1, height - 1) - 1)[:, :, None].expand(frames, height, width),
        ],
        -1,
    )
    return F.grid_sample(video, grid, align_corners=True), (grid.abs() <= 1).all(-1)
