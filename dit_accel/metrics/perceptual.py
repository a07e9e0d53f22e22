"""Perceptual distance, for those who have the package and its weights."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch

from .checks import check_frames, check_pair

NETWORKS = ("alex", "vgg", "squeeze")
LEAST_SIDE = 32  # pixels; smaller frames vanish in the network's poolings
_FRAMES_AT_ONCE = 8  # bounds the memory that long videos need


def lpips(a: torch.Tensor, b: torch.Tensor, net: str = "alex") -> float:
    """Learned perceptual image patch similarity (Zhang et al. 2018), version 0.1, averaged over frames.

    Computed by the authors' package in float32 on the device of ``a``. Its backbone's weights come from torchvision,
    which downloads them on first use.

    Args:
        a: ``[F, 3, H, W]`` floats in [0, 1]; H and W at least 32.
        b: the same shape.
        net: backbone: ``"alex"`` (the authors' choice for measuring), ``"vgg"`` or ``"squeeze"``.

    Returns:
        A distance without unit: 0 if both are equal, larger is worse.

    Raises:
        ImportError: if the package ``lpips`` is not installed.
        ValueError: as :func:`.psnr`, or if the layout, the frame size or ``net`` is another.
    """
    check_pair(a, b)
    check_frames(a, 1, "lpips")
    if min(a.shape[-2:]) < LEAST_SIDE:
        raise ValueError(f"lpips needs frames of at least {LEAST_SIDE} x {LEAST_SIDE} pixels, got {list(a.shape)}")
    model = _model(net).to(a.device)
    total = 0.0
    with torch.no_grad():
        for x, y in zip(a.split(_FRAMES_AT_ONCE), b.split(_FRAMES_AT_ONCE), strict=True):
            total += float(model(_symmetric(x), _symmetric(y.to(x.device))).double().sum())
    return total / len(a)


def _symmetric(frames: torch.Tensor) -> torch.Tensor:
    """From [0, 1] to the [-1, 1] that the network was trained on."""
    return frames.float() * 2 - 1


@cache
def _model(net: str) -> torch.nn.Module:
    if net not in NETWORKS:
        raise ValueError(f"unknown LPIPS network {net!r}; choose one of {', '.join(NETWORKS)}")
    try:
        package = import_module("lpips")
    except ImportError as error:
        raise ImportError(f"LPIPS needs a package that is missing ({error}); pip install lpips torchvision") from error
    network: torch.nn.Module = package.LPIPS(net=net, verbose=False)
    return network.eval().requires_grad_(False)
