"""How far one video is from another: PSNR, SSIM, and what the dense model itself would score."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

WINDOW = 11  # pixels
SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03
_TOLERANCE = 1e-3  # how far outside [0, 1] rounding may put a value


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio for values in [0, 1].

    The mean is taken over everything at once: all frames, channels and pixels weigh the same.

    Args:
        a: any shape, for example ``[F, 3, H, W]``, floats in [0, 1].
        b: the same shape.

    Returns:
        Decibels: ``10 log10(1 / mean squared error)``, infinity if both are equal, 0 for black against white.

    Raises:
        ValueError: if shapes differ, nothing is in them, or values are not floats in [0, 1].
    """
    _check_pair(a, b)
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


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
        ValueError: as :func:`psnr`, or if frames are too small to be mirrored.
    """
    _check_pair(a, b)
    smallest = WINDOW // 2 + 1
    if a.ndim < 2 or min(a.shape[-2:]) < smallest:
        raise ValueError(f"ssim needs frames of at least {smallest} x {smallest} pixels, got shape {list(a.shape)}")
    planes_a, planes_b = (video.reshape(-1, 1, *video.shape[-2:]) for video in (a, b))
    pieces = range(0, len(planes_a), 16)  # bounds the memory that long videos need
    means = [_plane_ssim(planes_a[start : start + 16], planes_b[start : start + 16]) for start in pieces]
    return torch.cat(means).mean().item()


def describe_noise_floor(decibels: float) -> str:
    """Says in one line what the PSNR between two dense runs from the same noise means.

    Args:
        decibels: PSNR of a dense run against its own repetition; infinity if they are bit-equal.
    """
    if math.isinf(decibels):
        return "inf dB: two dense runs are bit-equal, so every difference comes from the acceleration"
    return f"{decibels:.2f} dB: two dense runs differ by this much; a PSNR near or above it is no loss"


def _plane_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SSIM of each plane of ``[N, 1, H, W]``, as ``[N]``. In double, because variances are small differences."""
    x, y = x.double(), y.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(planes: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(WINDOW, dtype=planes.dtype, device=planes.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    mirrored = F.pad(planes, (WINDOW // 2,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(mirrored, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _check_pair(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"metrics need two videos of one shape, got {list(a.shape)} and {list(b.shape)}")
    for video in (a, b):
        if not video.is_floating_point():
            raise ValueError(f"metrics need floats in [0, 1], got {video.dtype}; divide 8-bit frames by 255")
        low, high = video.min().item(), video.max().item()
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
            raise ValueError(f"metrics need values in [0, 1], got {low:.4g} to {high:.4g}")
