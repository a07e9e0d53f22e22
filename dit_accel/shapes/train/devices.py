"""What differs between training on a CPU and on a GPU; every such setting is here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceSettings:
    """Sizes of the video model's training; a CPU sees fewer clips in more steps.

    Attributes:
        vae_steps: optimizer steps of the video autoencoder.
        vae_windows: (frames, batch) that its steps choose among.
        vae_pool: close-ups that are rendered at once.
        wan_steps: optimizer steps of the transformer.
        batch_factor: times the batch that a :class:`.Part` names.
        small_clips: how many different small clips there are.
        full_clips: how many different full ones.
        encode_batch: clips that are encoded at once.
    """

    vae_steps: int
    vae_windows: tuple[tuple[int, int], ...]
    vae_pool: int
    wan_steps: int
    batch_factor: int
    small_clips: int
    full_clips: int
    encode_batch: int


CPU = DeviceSettings(
    vae_steps=14000,
    vae_windows=((13, 4), (13, 4), (33, 2)),
    vae_pool=192,
    wan_steps=24000,
    batch_factor=1,
    small_clips=8192,
    full_clips=2048,
    encode_batch=2,
)
GPU = DeviceSettings(
    vae_steps=6000,
    vae_windows=((13, 24), (13, 24), (33, 10)),
    vae_pool=512,
    wan_steps=9000,
    batch_factor=5,
    small_clips=16384,
    full_clips=6144,
    encode_batch=16,
)


def settings_for(device: str | torch.device) -> DeviceSettings:
    """The settings of a device such as ``"cpu"`` or ``"cuda:0"``."""
    return CPU if torch.device(device).type == "cpu" else GPU


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where products in it are fast: on GPUs, and on CPUs with instructions for it.

    A CPU without them converts every product and needs three to five times as long as in float32.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # newer torch only
    return torch.bfloat16 if found.get("amx_bf16") or found.get("avx512_bf16") else torch.float32


def autocast(device: str | torch.device) -> torch.autocast:
    """Automatic bfloat16 where it is fast, nothing elsewhere."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_dtype(device) is torch.bfloat16)
