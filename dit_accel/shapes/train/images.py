"""What the image models train on: scenes encoded once and kept on disk, small ones first, full ones later."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from ..recipes.image_vae import IMAGE_SIDE
from ..world import Scene, SceneWords, render, sample_scene, sample_words
from .devices import settings_for
from .muon import Muon

OBJECTS, OBJECT_SHARES = (1, 2, 3), (0.60, 0.35, 0.05)
PROMPT_DROPOUT = 0.1  # share of empty prompts, which classifier-free guidance needs
ENCODED_AT_ONCE = 16


@dataclass(frozen=True)
class ImageSet:
    """A number of different square images.

    Attributes:
        side: height and width in pixels.
        images: how many.
    """

    side: int
    images: int


SMALL = ImageSet(side=IMAGE_SIDE // 2, images=12288)
FULL = ImageSet(side=IMAGE_SIDE, images=8192)


@dataclass(frozen=True)
class Curriculum:
    """Small images first, which teach words and forms at a fraction of the cost, then full ones among them.

    Attributes:
        steps: optimizer steps in all on a CPU; a GPU takes half as many, of larger batches.
        small_part: part of the steps that sees small images alone.
        full_share: share of the later steps that see full ones.
        small_batch: images of a step on a CPU.
        full_batch: likewise.
    """

    steps: int
    small_part: float
    full_share: float
    small_batch: int
    full_batch: int

    def steps_on(self, device: str) -> int:
        """Optimizer steps on a device."""
        return self.steps if torch.device(device).type == "cpu" else self.steps // 2

    def at(self, progress: float, device: str, rng: random.Random) -> tuple[ImageSet, int]:
        """The set and the batch of one step, ``progress`` (0 to 1) into the run."""
        factor = settings_for(device).batch_factor
        if progress >= self.small_part and rng.random() < self.full_share:
            return FULL, factor * self.full_batch
        return SMALL, factor * self.small_batch


class EncodedImages:
    """Latents of rendered scenes; a set is encoded when it is first asked for.

    Args:
        vae: the trained autoencoder. Sets that another one encoded are made anew.
        folder: where the sets are kept.
        device: where to render and encode, and where batches lie.
    """

    def __init__(self, vae: AutoencoderKL, folder: Path, device: str) -> None:
        self.vae, self.folder, self.device = vae.to(device).eval(), folder, device
        self._sets: dict[ImageSet, dict[str, Any]] = {}

    def draw(self, images: ImageSet, batch: int, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
        """Latents ``[batch, channels, side, side]`` as the encoder makes them, and prompts, some of them emptied."""
        if images not in self._sets:
            self._sets[images] = self._load(images)
        latents, prompts = self._sets[images]["latents"], self._sets[images]["prompts"]
        chosen = [rng.randrange(len(prompts)) for _ in range(batch)]
        texts = ["" if rng.random() < PROMPT_DROPOUT else prompts[index] for index in chosen]
        return latents[chosen].float().to(self.device), texts

    def _load(self, images: ImageSet) -> dict[str, Any]:
        file = self.folder / f"images-{images.side}-{images.images}-{weights_digest(self.vae)}.pt"
        if not file.exists():
            rng = random.Random(f"training images {images.side}")
            scenes = [sample_scene(rng, training_words(rng)) for _ in range(images.images)]
            starts = range(0, len(scenes), ENCODED_AT_ONCE)
            latents = [self._encode(scenes[start : start + ENCODED_AT_ONCE], images.side) for start in starts]
            beside = file.with_suffix(".tmp")
            torch.save({"latents": torch.cat(latents), "prompts": [scene.prompt for scene in scenes]}, beside)
            beside.rename(file)
        return torch.load(file, weights_only=True)

    @torch.no_grad()
    def _encode(self, scenes: list[Scene], side: int) -> torch.Tensor:
        pixels = torch.cat([render(scene, 1, side, side, device=self.device).video for scene in scenes]) * 2 - 1
        return self.vae.encode(pixels).latent_dist.mode().half().cpu()


def training_words(rng: random.Random) -> SceneWords:
    """A sentence about an image that is not held out; most often about one object."""
    return sample_words(rng, objects=rng.choices(OBJECTS, OBJECT_SHARES)[0], motion=False)


def optimizers(model: nn.Module, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer blocks, AdamW for everything else, their modulation too."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if "transformer_blocks." in name and ".norm" not in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    return [Muon(matrices, lr=muon_lr), torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.01)]


def weights_digest(module: nn.Module) -> str:
    """Short SHA-256 over all weights."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def run_of(device: str, vae: nn.Module, model: nn.Module, init: Path | None) -> dict[str, str]:
    """What the training of a denoiser depends on besides its schedule, as :class:`.Trainer` takes it.

    Args:
        device: where to train; batches and sets differ between CPU and GPU.
        vae: the trained autoencoder.
        model: as training begins.
        init: pipeline folder that its weights are from; None for random ones.
    """
    start = "none" if init is None else weights_digest(model)
    return {"init": start, "autoencoder": weights_digest(vae), "device": torch.device(device).type}
