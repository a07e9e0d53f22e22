"""Trains the video autoencoder on small crops; being convolutional it then serves every frame size."""

from __future__ import annotations

import random
import unittest.mock
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from ..recipe import build_vae
from ..world import Scene, all_attributes, render, sample_scene
from .loop import LoopConfig, Trainer

CROP = 64
KL_WEIGHT = 1e-4
SHORT_STEPS = 3000  # the first steps see 5-frame crops, which learn space quickly
SHORT, LONG = (5, 8), (13, 4)  # frames and batch; from the third chunk on the decoder runs on cached features alone


def train_vae(folder: Path, steps: int = 4200, device: str = "cpu") -> None:
    """Trains or resumes, then writes the autoencoder with its latent statistics to ``folder / 'vae'``."""
    torch.manual_seed(0)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    trainer = Trainer(vae, [optimizer], LoopConfig(steps=steps), folder)

    def loss_at(step: int) -> torch.Tensor:
        video = crops(step).to(device)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(video).latent_dist
            decoded = decode_unclamped(vae, posterior.sample())
        error = decoded.float() - video
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return error.square().mean() + 0.1 * error.abs().mean() + KL_WEIGHT * kl

    trainer.fit(loss_at)
    trainer.load_average()
    measure_latents(vae, device)
    vae.save_pretrained(folder / "vae")


def crops(step: int) -> torch.Tensor:
    """The batch of one step: close-ups of moving edges and corners, ``[batch, 3, frames, crop, crop]`` in [-1, 1]."""
    rng = random.Random(f"crops {step}")
    frames, batch = SHORT if step < SHORT_STEPS else LONG
    videos = []
    for _ in range(batch):
        scene = Scene(
            rng.choice(all_attributes()),
            size=rng.uniform(0.2, 0.9),
            center=(rng.uniform(-0.1, 1.1), rng.uniform(-0.1, 1.1)),
            travel=rng.uniform(0.0, 0.07 * frames),
        )
        videos.append(render(scene, frames, CROP, CROP).video.transpose(0, 1))
    return torch.stack(videos) * 2 - 1


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decodes as ``vae.decode`` does, but keeps gradients alive beyond [-1, 1], where the stock call clamps."""
    with unittest.mock.patch("torch.clamp", lambda value, **limits: value):
        return vae.decode(latents).sample


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, device: str, clips: int = 48) -> None:
    """Sets ``latents_mean`` and ``latents_std`` so that the transformer sees channels of unit variance."""
    rng = random.Random("latent statistics")
    means = []
    for _ in range(clips):
        video = render(sample_scene(rng), 17, 128, 128).video.transpose(0, 1)[None] * 2 - 1
        means.append(vae.encode(video.to(device)).latent_dist.mode())
    latents = torch.cat(means).transpose(0, 1).flatten(1).float()
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, clips: int = 16, frames: int = 33, side: int = 256) -> list[float]:
    """PSNR in dB of encode-decode on clips training never saw, one value a clip."""
    rng, values = random.Random("held-out reconstruction"), []
    for _ in range(clips):
        video = render(sample_scene(rng), frames, side, side).video.transpose(0, 1)[None] * 2 - 1
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        values.append(-10 * float(torch.log10(F.mse_loss(decoded.float(), video) / 4)))
    return values
