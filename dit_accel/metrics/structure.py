"""Structural similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import check_pair

WINDOW = 11  # pixels
SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 x 11 pixels, sigma 1.5, K1 0.01, K2 0.03.

    Each frame and channel is compared on its own, mirrored at the edges so that every pixel counts, and the results
    are averaged; the figures equal those of torchmetrics.

    Args:
        a: ``[..., H, W]``, for example ``[F, 3, H, W]``, floats in [0, 1]; H and W at least 6.
        b: the same shape.

    Returns:
        A number without unit, at most 1; 1 if both are equal.

    Raises:
        ValueError: as :func:`.psnr`, or if frames are too small to be mirrored.
    """
    check_pair(a, b)
    smallest = WINDOW // 2 + 1
    if a.ndim < 2 or min(a.shape[-2:]) < smallest:
        raise ValueError(f"ssim needs frames of at least {smallest} x {smallest} pixels, got shape {list(a.shape)}")
    planes_a, planes_b = (video.reshape(-1, 1, *video.shape[-2:]) for video in (a, b))
    pieces = range(0, len(planes_a), 16)  # bounds the memory that long videos need
    means = [
        plane_ssim(planes_a[start : start + 16], planes_b[start : start + 16]).mean((1, 2, 3)) for start in pieces
    ]
    return torch.cat(means).mean().item()


def plane_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SSIM of every pixel of planes ``[N, 1, H, W]``. In double, because variances are small differences."""
    x, y = x.double(), y.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance * structure


def _blur(planes: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(WINDOW, dtype=planes.dtype, device=planes.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    mirrored = F.pad(planes, (WINDOW // 2,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(mirrored, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
