"""GPU generations: what the tables of tile sizes are keyed by, and what limits a tile."""

from __future__ import annotations

import torch

# Largest shared memory of one program, in bytes.
SHARED_LIMIT = {
    "ampere": 163 * 1024,
    "ada": 99 * 1024,
    "hopper": 227 * 1024,
    "blackwell": 227 * 1024,
    "geforce-blackwell": 99 * 1024,
    "amd": 64 * 1024,
}


def generation(capability: tuple[int, int] | None) -> str:
    """Names the generation of a GPU.

    Args:
        capability: CUDA compute capability, or None for AMD GPUs (and Triton's interpreter).

    Returns:
        A key of `SHARED_LIMIT`.  Cards of compute capability 8.6 count as "ada", which holds as little shared memory;
        generations to come count as "geforce-blackwell", which asks for least.
    """
    if capability is None:
        return "amd"
    if capability < (9, 0):
        return "ampere" if capability in ((8, 0), (8, 7)) else "ada"
    return {9: "hopper", 10: "blackwell"}.get(capability[0], "geforce-blackwell")


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of a device; None for AMD GPUs, and for the CPU of Triton's interpreter."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)
