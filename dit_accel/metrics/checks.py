"""What every metric asks of its videos."""

from __future__ import annotations

import torch

_TOLERANCE = 1e-3  # how far outside [0, 1] rounding may put a value


def check_pair(a: torch.Tensor, b: torch.Tensor) -> None:
    """Refuses two videos that cannot be compared.

    Raises:
        ValueError: if shapes differ, nothing is in them, or values are not floats in [0, 1].
    """
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"metrics need two videos of one shape, got {list(a.shape)} and {list(b.shape)}")
    check_values(a)
    check_values(b)


def check_values(video: torch.Tensor) -> None:
    """Refuses values that are no floats in [0, 1]; NaN too.

    Raises:
        ValueError: saying what the values are.
    """
    if not video.is_floating_point():
        raise ValueError(f"metrics need floats in [0, 1], got {video.dtype}; divide 8-bit frames by 255")
    low, high = video.min().item(), video.max().item()
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        raise ValueError(f"metrics need values in [0, 1], got {low:.4g} to {high:.4g}")


def check_frames(video: torch.Tensor, least: int, metric: str) -> None:
    """Refuses what is not ``[F, 3, H, W]`` with enough frames.

    Raises:
        ValueError: naming the metric, the layout and what was given.
    """
    if video.ndim != 4 or video.shape[1] != 3 or len(video) < least:
        frames = f"at least {least} frame" + ("s" if least > 1 else "")
        raise ValueError(f"{metric} needs a video [F, 3, H, W] of {frames}, got shape {list(video.shape)}")
