"""Clips encoded once and kept on disk, so that training the transformer never waits for the autoencoder."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan

from ..recipes.wan import FRAMES, SHIFT, SIDE
from ..world import Scene, render, sample_scene, sample_words
from .devices import settings_for
from .images import OBJECT_SHARES, OBJECTS, PROMPT_DROPOUT, weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD = 64  # clips of a file; a set grows by whole files, so that an interrupted one goes on


@dataclass(frozen=True)
class Part:
    """The beginning of a clip, as one optimizer step sees it: short beginnings teach form at a fraction of the cost.

    Attributes:
        latent_frames: how many; the first stands for one frame of the clip, each further one for four.
        batch: clips per optimizer step on a CPU.
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
        parts: how much of a clip an optimizer step sees, and how often.
    """

    frames: int
    side: int
    parts: tuple[Part, ...]


SMALL = ClipSize(frames=17, side=SIDE // 2, parts=(Part(latent_frames=5, batch=16, shift=8.0),))
FULL = ClipSize(
    frames=FRAMES,
    side=SIDE,
    parts=(
        Part(latent_frames=9, batch=3, shift=SHIFT, share=0.35),
        Part(latent_frames=5, batch=6, shift=10.0, share=0.2),
        Part(latent_frames=3, batch=10, shift=8.0, share=0.45),
    ),
)


class EncodedClips:
    """A set of clips on the training device, and their prompts as tokens.

    Args:
        latents: ``[clips, channels, frames, height, width]`` float16.
        prompts: as many sentences.
        tokenizer: that of the pipeline.
        device: where batches are drawn.
    """

    def __init__(
        self, latents: torch.Tensor, prompts: list[str], tokenizer: PreTrainedTokenizerFast, device: str
    ) -> None:
        text = tokenizer([*prompts, ""], padding=True, return_tensors="pt").to(device)  # the last one is empty
        self.latents, self.tokens, self.mask = latents.to(device), text.input_ids, text.attention_mask

    def draw(self, latent_frames: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Beginnings of clips, drawn on the device.

        Returns:
            Latents ``[batch, channels, latent_frames, height, width]`` float32, token numbers and their mask
            ``[batch, tokens]``; some prompts are empty, which classifier-free guidance needs.
        """
        count, device = len(self.latents), self.latents.device
        chosen = torch.randint(count, (batch,), device=device)
        said = torch.where(torch.rand(batch, device=device) < PROMPT_DROPOUT, count, chosen)
        return self.latents[chosen, :, :latent_frames].float(), self.tokens[said], self.mask[said]


def encoded_clips(
    vae: AutoencoderKLWan, size: ClipSize, count: int, folder: Path, device: str = "cpu"
) -> tuple[torch.Tensor, list[str]]:
    """Loads the first clips of a set, encoding what is missing; a larger set begins with a smaller one.

    Clips that another autoencoder encoded are left alone.

    Returns:
        Latents ``[count, channels, frames, height, width]`` float16, normalized to unit variance, on the CPU, and as
        many sentences.
    """
    folder = folder / f"clips-{size.frames}x{size.side}x{size.side}-{weights_digest(vae)}"
    folder.mkdir(parents=True, exist_ok=True)
    vae = vae.to(device).eval()
    shards = [_shard(vae, size, index, folder, device) for index in range(-(-count // SHARD))]
    latents = torch.cat([shard["latents"] for shard in shards])[:count]
    return latents, [prompt for shard in shards for prompt in shard["prompts"]][:count]


def training_scene(rng: random.Random) -> Scene:
    """A clip whose sentence is not held out; most often of one object."""
    return sample_scene(rng, sample_words(rng, objects=rng.choices(OBJECTS, OBJECT_SHARES)[0]))


def pixels(scenes: list[Scene], frames: int, side: int, device: str | torch.device) -> torch.Tensor:
    """Rendered clips as the autoencoder reads them, ``[scenes, 3, frames, side, side]`` in [-1, 1]."""
    videos = torch.stack([render(scene, frames, side, side, device=device).video for scene in scenes])
    return videos.transpose(1, 2) * 2 - 1


def _shard(vae: AutoencoderKLWan, size: ClipSize, index: int, folder: Path, device: str) -> dict[str, Any]:
    file = folder / f"{index:04d}.pt"
    if not file.exists():
        rng = random.Random(f"training clips {size.frames}x{size.side} {index}")
        scenes = [training_scene(rng) for _ in range(SHARD)]
        step = settings_for(device).encode_batch
        latents = [_encode(vae, scenes[start : start + step], size, device) for start in range(0, SHARD, step)]
        beside = file.with_suffix(".tmp")
        torch.save({"latents": torch.cat(latents).cpu(), "prompts": [scene.prompt for scene in scenes]}, beside)
        beside.rename(file)
        print(f"encoded {file}", flush=True)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def _encode(vae: AutoencoderKLWan, scenes: list[Scene], size: ClipSize, device: str) -> torch.Tensor:
    latents = vae.encode(pixels(scenes, size.frames, size.side, device)).latent_dist.mode()
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return ((latents - mean) / std).half()
