"""Clips encoded once and kept on disk, so that training the transformer never waits for the autoencoder."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from ..recipe import SHIFT
from ..world import Scene, render, sample_scene


@dataclass(frozen=True)
class Part:
    """The beginning of a clip, as one optimizer step sees it: short beginnings teach form at a fraction of the cost.

    Attributes:
        latent_frames: how many; the first stands for one frame of the clip, each further one for four.
        batch: clips per optimizer step.
        shift: of the noise levels; larger clips need more noise before they are unrecognisable.
        share: how often steps see this part, relative to the other parts.
    """

    latent_frames: int
    batch: int
    shift: float
    share: float = 1.0


@dataclass(frozen=True)
class ClipSize:
    """A clip length and frame size, and how it is trained on.

    Attributes:
        frames: frames of a clip.
        side: height and width in pixels.
        clips: how many different clips to encode.
        parts: how much of a clip an optimizer step sees, and how often.
    """

    frames: int
    side: int
    clips: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """File name of the encoded set."""
        return f"latents-{self.frames}x{self.side}x{self.side}-{self.clips}.pt"


SMALL = ClipSize(frames=17, side=128, clips=3072, parts=(Part(latent_frames=5, batch=16, shift=8.0),))
FULL = ClipSize(
    frames=33,
    side=256,
    clips=512,
    parts=(
        Part(latent_frames=9, batch=3, shift=SHIFT, share=0.35),
        Part(latent_frames=5, batch=6, shift=10.0, share=0.2),
        Part(latent_frames=3, batch=10, shift=8.0, share=0.45),
    ),
)


@torch.no_grad()
def encoded_clips(vae: AutoencoderKLWan, size: ClipSize, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Loads the encoded set of one size, making it first if need be.

    Returns:
        ``latents`` ``[clips, channels, frames, height, width]`` fp16, normalised to unit variance, and ``prompts``, a
        list of as many sentences.
    """
    file = folder / size.name
    if not file.exists():
        rng = random.Random(f"training clips {size.frames}x{size.side}")
        scenes = [sample_scene(rng) for _ in range(size.clips)]
        half = vae.to(device, torch.bfloat16)
        latents = torch.stack([_encode(half, scene, size, device) for scene in scenes])
        beside = file.with_suffix(".tmp")
        torch.save({"latents": latents, "prompts": [scene.prompt for scene in scenes]}, beside)
        beside.rename(file)
    return torch.load(file, weights_only=True)


def _encode(vae: AutoencoderKLWan, scene: Scene, size: ClipSize, device: str) -> torch.Tensor:
    video = render(scene, size.frames, size.side, size.side).video.transpose(0, 1)[None] * 2 - 1
    latent = vae.encode(video.to(device, vae.dtype)).latent_dist.mode()[0].float().cpu()
    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    return ((latent - mean) / std).half()
