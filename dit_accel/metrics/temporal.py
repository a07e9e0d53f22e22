"""What happens between frames: how much moves, and how much flickers."""

from __future__ import annotations

import math

import torch

from .checks import check_frames, check_pair, check_values


def motion_ratio(video: torch.Tensor, reference: torch.Tensor) -> float:
    """How much of the reference's motion a video kept: mean absolute frame difference over that of the reference.

    Accelerators that lose motion freeze the picture long before single frames look wrong; a ratio below about 0.9 is
    an alarm. The frame difference is the mean absolute error between neighbours that VBench (Huang et al. 2024) takes
    for flicker in clips that stand still; in clips that move, most of it is motion.

    Args:
        video: ``[F, 3, H, W]`` floats in [0, 1], at least 2 frames.
        reference: the same shape; the dense run from the same noise.

    Returns:
        A number without unit: 1 if both move alike (or both stand still), 0 for a frozen video, infinity if only the
        reference stands still.

    Raises:
        ValueError: as :func:`.psnr`, or if there are fewer than two frames.
    """
    check_pair(video, reference)
    check_frames(video, 2, "motion_ratio")
    moved, expected = _mean_change(video), _mean_change(reference)
    if expected == 0:
        return 1.0 if moved == 0 else math.inf
    return moved / expected


def flicker(video: torch.Tensor, reference: torch.Tensor | None = None) -> float:
    """How much pixels change from frame to frame that should not.

    Without a reference this is the mean absolute error between neighbouring frames (what VBench, Huang et al. 2024,
    subtracts from 1 as temporal flickering), which is flicker only where nothing moves. With a reference it is the
    mean absolute difference between the frame differences of both (the dtSSD of Erofeev et al. 2015, with absolute
    values in place of squares): motion that both share cancels, and so does an error that stands still.

    Args:
        video: ``[F, 3, H, W]`` floats in [0, 1], at least 2 frames.
        reference: the same shape, or None.

    Returns:
        Mean absolute change per frame: 0 for none; black and white in turns give 1.

    Raises:
        ValueError: as :func:`.psnr`, or if there are fewer than two frames.
    """
    if reference is None:
        check_frames(video, 2, "flicker")
        check_values(video)
        return _mean_change(video)
    check_pair(video, reference)
    check_frames(video, 2, "flicker")
    return _mean_change(video, reference)


def _mean_change(video: torch.Tensor, reference: torch.Tensor | None = None) -> float:
    """Mean absolute difference of neighbouring frames, of the video or of how it differs from the reference.

    Frame by frame and in double: long videos would not fit into memory as a whole.
    """
    before, total = None, 0.0
    for index, frame in enumerate(video):
        now = frame.double() if reference is None else frame.double() - reference[index].double()
        if before is not None:
            total += (now - before).abs().mean().item()
        before = now
    return total / (len(video) - 1)
