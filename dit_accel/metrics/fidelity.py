"""Peak signal-to-noise ratio, and how much of a difference is noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from .checks import check_pair


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
    check_pair(a, b)
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def noise_floor(runs: Sequence[torch.Tensor]) -> float:
    """PSNR that the dense model reaches against itself: repeated runs from the same noise may differ.

    Kernels that add in varying order make two equal runs unequal (PyTorch's notes on reproducibility). A difference
    of an accelerated run no larger than this one is no loss; so every PSNR is to be read beside it.

    Args:
        runs: at least two dense runs of one prompt and seed, all of one shape, floats in [0, 1].

    Returns:
        The lowest :func:`psnr` between any two of them, in dB; infinity if all are bit-equal.

    Raises:
        ValueError: if there are fewer than two runs, or :func:`psnr` refuses them.
    """
    if len(runs) < 2:
        raise ValueError(f"the noise floor is that between dense runs: give at least 2 of them, got {len(runs)}")
    return min(psnr(a, b) for a, b in itertools.combinations(runs, 2))


def describe_noise_floor(decibels: float) -> str:
    """Says in one line what the PSNR between two dense runs from the same noise means.

    Args:
        decibels: what :func:`noise_floor` gave; infinity if the runs are bit-equal.
    """
    if math.isinf(decibels):
        return "inf dB: two dense runs are bit-equal, so every difference comes from the acceleration"
    return f"{decibels:.2f} dB: two dense runs differ by this much; a PSNR near or above it is no loss"
