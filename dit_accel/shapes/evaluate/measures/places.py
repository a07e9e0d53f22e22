"""Where objects are, measured against the truth: overlap of masks, places and steps of their centers."""

from __future__ import annotations

import math

import torch

from ..working import moments


def mask_iou(mask: torch.Tensor, truth: torch.Tensor) -> float:
    """Intersection over union of two masks, averaged over frames and objects; 1 where both are empty.

    Args:
        mask: ``[frames, height, width]`` or ``[frames, objects, height, width]``, bool or coverage in [0, 1] (more
            than half counts).
        truth: the same number of frames, objects and pixels.

    Raises:
        ValueError: if these differ.
    """
    first, second = as_mask(mask), as_mask(truth)
    if first.shape != second.shape:
        raise ValueError(f"masks to compare must have one shape, got {list(mask.shape)} and {list(truth.shape)}")
    common, either = (first & second).sum((2, 3)).double(), (first | second).sum((2, 3)).double()
    return float(torch.where(either > 0, common / either.clamp_min(1), 1.0).mean())


def centroids(mask: torch.Tensor) -> torch.Tensor:
    """Centroids (x, y) of masks in pixels, ``[frames, objects, 2]``; NaN where one is empty."""
    planes = as_mask(mask)
    area, centers = moments(planes.flatten(0, 1).float().cpu())
    return torch.where(area[:, None] > 0, centers, torch.nan).view(*planes.shape[:2], 2)


def centroid_error(places: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean distance between two tracks, in pixels; infinity where only one of them shows the object.

    Args:
        places: centers ``[frames, 2]`` or ``[frames, objects, 2]`` (x, y) in pixels, NaN where there is none; or
            masks, of which the centroids count.
        truth: likewise.

    Raises:
        ValueError: if numbers of frames or objects differ, or no frame shows anything.
    """
    return _mean_distance(*_pair(places, truth))


def trajectory_error(places: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean difference between the steps of two tracks from frame to frame, in pixels per frame.

    Tracks that lie beside each other at a constant distance have none.

    Args:
        places: as for :func:`centroid_error`, at least 2 frames.
        truth: likewise.

    Raises:
        ValueError: likewise, or if there are fewer than two frames.
    """
    first, second = _pair(places, truth)
    if len(first) < 2:
        raise ValueError(f"trajectory_error needs at least 2 frames, got {len(first)}")
    return _mean_distance(first.diff(dim=0), second.diff(dim=0))


def as_mask(mask: torch.Tensor) -> torch.Tensor:
    """``[frames, objects, height, width]`` bool.

    Raises:
        ValueError: if it has another number of dimensions, or none of its pixels.
    """
    if mask.ndim not in (3, 4) or not mask.numel():
        raise ValueError(
            f"a mask is [frames, height, width] or [frames, objects, height, width], got {list(mask.shape)}"
        )
    planes = mask[:, None] if mask.ndim == 3 else mask
    return planes if planes.dtype == torch.bool else planes > 0.5


def _pair(places: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = _centers(places), _centers(truth)
    if first.shape != second.shape:
        raise ValueError(
            "tracks to compare must have as many frames and objects,"
            f" got {list(first.shape[:2])} and {list(second.shape[:2])}"
        )
    return first, second


def _centers(places: torch.Tensor) -> torch.Tensor:
    if places.shape[-1:] == (2,) and places.ndim in (2, 3):
        return (places[:, None] if places.ndim == 2 else places).double().cpu()
    return centroids(places).double()


def _mean_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    missing, unwanted = first.isnan().any(-1), second.isnan().any(-1)
    if bool((missing & unwanted).all()):
        raise ValueError("neither track shows an object; there is no distance to measure")
    distance = torch.where(missing ^ unwanted, math.inf, (first - second).norm(dim=-1))
    return float(distance[~(missing & unwanted)].mean())
