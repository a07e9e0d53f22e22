"""Trains the image autoencoder on close-ups and whole scenes; both image pipelines use it."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..recipes.image_vae import IMAGE_SIDE, LATENT_CHANNELS, build_image_vae
from ..world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    TEXTURES,
    ObjectWords,
    Scene,
    SceneObject,
    held_out,
    render,
    sample_scene,
)
from .devices import autocast
from .images import OBJECTS, training_words
from .loop import LoopConfig, Trainer

KL_WEIGHT = 1e-4
# Side and batch of a step; all cost the same. Group norm sees whole images, so training must see them too.
BATCHES = ((64, 16), (128, 4), (IMAGE_SIDE, 1))
SHARES = (0.5, 0.3, 0.2)
QUIET = -5.0  # log variance of the latents at first; at 0 the noise drowns what the encoder has to say
RADII = (9.0, 70.0)  # of an object in a close-up, in pixels; those of small and large objects in images of 128 and 256


def train_image_vae(folder: Path, steps: int = 5000, device: str = "cpu") -> None:
    """Trains or resumes, then writes the autoencoder with its latent statistics to ``folder / 'vae'``."""
    torch.manual_seed(0)
    vae = start_as_scaling(build_image_vae()).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    run = {"device": torch.device(device).type}
    trainer = Trainer(vae, [optimizer], LoopConfig(steps=steps), folder, run)
    trainer.fit(lambda step: reconstruction_loss(vae, image_batch(step, device)))
    trainer.load_average()
    measure_latents(vae)
    vae.save_pretrained(folder / "vae")


@torch.no_grad()
def start_as_scaling(vae: AutoencoderKL) -> AutoencoderKL:
    """Lets an untrained autoencoder average and repeat pixels, with little noise in between; returns it.

    From random weights all latent channels first learn brightness, and colors wait for a long time.
    """
    for name, module in vae.named_modules():
        if isinstance(module, ResnetBlock2D):  # adds nothing yet
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif name.endswith("samplers.0.conv"):
            nn.init.zeros_(module.bias)
            nn.init.dirac_(module.weight)
            if "downsamplers" in name:  # stride 2, padded on the right and below only
                nn.init.zeros_(module.weight)
                module.weight.diagonal()[:2, :2] = 0.25
    vae.encoder.conv_out.bias[LATENT_CHANNELS:] = QUIET
    return vae


def reconstruction_loss(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Squared and absolute error of encode-decode, and a little pull of the latents to a normal distribution."""
    with autocast(images.device):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - images
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return error.square().mean() + 0.1 * error.abs().mean() + KL_WEIGHT * kl


def image_batch(step: int, device: str = "cpu") -> torch.Tensor:
    """The batch of one step, ``[batch, 3, side, side]`` in [-1, 1]."""
    rng = random.Random(f"images {step}")
    side, batch = rng.choices(BATCHES, SHARES)[0]
    scenes = [_whole(rng) if side == IMAGE_SIDE else _close_up(rng, side) for _ in range(batch)]
    return torch.cat([render(scene, 1, side, side, device=device).video for scene in scenes]) * 2 - 1


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, images: int = 128) -> None:
    """Sets the scaling and shift factors so that the denoiser sees zero mean and unit variance over all channels."""
    latents = torch.cat([vae.encode(image).latent_dist.mode() for image in _images("latent statistics", images, vae)])
    vae.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))


@torch.no_grad()
def image_psnr(vae: AutoencoderKL, images: int = 64) -> list[float]:
    """PSNR in dB of encode-decode on images whose sentences training never saw, of one and of two objects in turn."""
    single, pair = (held_out(subset, -(-images // 2), motion=False) for subset in ("single", "pair"))
    sentences = [words for both in zip(single, pair, strict=True) for words in both]
    rng, values = random.Random("held-out reconstruction"), []
    for words in sentences[:images]:
        image = _image(sample_scene(rng, words), vae)
        decoded = vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * float(torch.log10(F.mse_loss(decoded, image) / 4)))
    return values


def _images(seed: str, count: int, vae: AutoencoderKL) -> list[torch.Tensor]:
    """Whole images that training may see."""
    rng = random.Random(seed)
    return [_image(_whole(rng), vae) for _ in range(count)]


def _image(scene: Scene, vae: AutoencoderKL) -> torch.Tensor:
    return render(scene, 1, IMAGE_SIDE, IMAGE_SIDE, device=vae.device).video * 2 - 1


def _whole(rng: random.Random) -> Scene:
    return sample_scene(rng, training_words(rng))


def _close_up(rng: random.Random, side: int) -> Scene:
    """Edges and corners of any objects, cut off and overlapping."""
    least, most = RADII
    items = tuple(
        SceneObject(
            ObjectWords(rng.choice(tuple(COLORS)), rng.choice(SHAPES), texture=rng.choice(TEXTURES)),
            size=least * (most / least) ** rng.random() / side,
            center=(rng.uniform(-0.1, 1.1), rng.uniform(-0.1, 1.1)),
        )
        for _ in range(rng.choice(OBJECTS))
    )
    return Scene(items, rng.choice(tuple(BACKGROUNDS)), rng.random() < 0.5)
