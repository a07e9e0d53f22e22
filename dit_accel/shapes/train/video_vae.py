"""Trains the video autoencoder on close-ups of clips; being convolutional it then serves every frame size."""

from __future__ import annotations

import random
import unittest.mock
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from ..recipes.wan import FRAMES, SIDE, build_video_vae
from ..world import Scene, SceneObject, backdrop, held_out, render, sample_scene, trajectory
from .devices import autocast, settings_for
from .latents import pixels, training_scene
from .loop import LoopConfig, Trainer

CROP = 64
KL_WEIGHT = 1e-4
STATISTICS_CLIPS = 32
POOL_STEPS = 200  # after so many steps other close-ups are rendered
SIDES = (SIDE, SIDE, SIDE, SIDE // 2)  # of the clips that close-ups are taken from


def train_video_vae(folder: Path, steps: int | None = None, device: str = "cpu") -> None:
    """Trains or resumes, then writes the autoencoder with its latent statistics to ``folder / 'vae'``.

    Args:
        folder: checkpoint and log.
        steps: optimizer steps in all; None takes the device's usual number.
        device: where to render and train.
    """
    torch.manual_seed(0)
    vae = build_video_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    config, run = LoopConfig(steps=steps or settings_for(device).vae_steps), {"device": torch.device(device).type}
    trainer = Trainer(vae, [optimizer], config, folder, run)
    close_ups = CloseUps(device)
    trainer.fit(lambda step: reconstruction_loss(vae, close_ups.at(step)))
    trainer.load_average()
    measure_latents(vae)
    vae.save_pretrained(folder / "vae")


def reconstruction_loss(vae: AutoencoderKLWan, videos: torch.Tensor) -> torch.Tensor:
    """Squared and absolute error of encode-decode, and a little pull of the latents to a normal distribution."""
    with autocast(videos.device):
        posterior = vae.encode(videos).latent_dist
        decoded = decode_unclamped(vae, posterior.sample())
    error = decoded.float() - videos
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return error.square().mean() + 0.1 * error.abs().mean() + KL_WEIGHT * kl


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decodes as ``vae.decode`` does, but keeps gradients alive beyond [-1, 1], where the stock call clamps."""
    with unittest.mock.patch("torch.clamp", lambda value, **limits: value):
        return vae.decode(latents).sample


class CloseUps:
    """Windows of training clips around their objects, rendered many at once and drawn from for some steps.

    The decoder runs on features of the frames before from the second latent frame on, and errors add up there, so
    windows are long from the beginning, and some have all frames of a clip.

    Args:
        device: where to render; batches stay there.
    """

    def __init__(self, device: str) -> None:
        self.device, self.settings = device, settings_for(device)
        self._number, self._pool = -1, torch.empty(0)

    def at(self, step: int) -> torch.Tensor:
        """The batch of one step, ``[batch, 3, frames, CROP, CROP]`` in [-1, 1]; torch's seed decides what is drawn."""
        if step // POOL_STEPS != self._number:
            self._number = step // POOL_STEPS
            rng = random.Random(f"close-ups {self._number}")
            videos = [close_up(training_scene(rng), rng, self.device) for _ in range(self.settings.vae_pool)]
            self._pool = torch.stack(videos)
        rng = random.Random(f"windows {step}")
        frames, batch = rng.choice(self.settings.vae_windows)
        start = rng.randrange(FRAMES - frames + 1)
        chosen = torch.randint(len(self._pool), (batch,), device=self._pool.device)
        return self._pool[chosen, :, start : start + frames].float() / 127.5 - 1


def close_up(scene: Scene, rng: random.Random, device: str | torch.device = "cpu") -> torch.Tensor:
    """A square window of a whole clip with one of its objects in or near it, uint8 ``[3, FRAMES, CROP, CROP]``."""
    side = rng.choice(SIDES)
    centers = trajectory(rng.choice(scene.objects), FRAMES, side, side)
    moment = centers[rng.randrange(FRAMES // 4, FRAMES - FRAMES // 4)].tolist()
    left, top = (min(max(round(at - rng.uniform(-0.1, 1.1) * CROP), 0), side - CROP) for at in moment)
    return (window(scene, side, left, top, device) * 255).round().to(torch.uint8).transpose(0, 1)


def window(scene: Scene, side: int, left: int, top: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """What a clip of ``side`` pixels shows right of ``left`` and below ``top``, ``[FRAMES, 3, CROP, CROP]``.

    Drawn at its own size: the scene is enlarged and moved instead, and only the background's gradient is put right.
    """
    zoom = side / CROP
    near = replace(scene, objects=tuple(_seen_from(item, zoom, left / CROP, top / CROP) for item in scene.objects))
    clip = render(near, FRAMES, CROP, CROP, device=device)
    whole = backdrop(scene.background, scene.gradient, side, side, device=device)
    behind = whole[:, top : top + CROP, left : left + CROP] - clip.backdrop
    return clip.video + (1 - clip.masks.sum(1, keepdim=True)) * behind


def _seen_from(item: SceneObject, zoom: float, left: float, top: float) -> SceneObject:
    center = (item.center[0] * zoom - left, item.center[1] * zoom - top)
    return replace(item, size=item.size * zoom, center=center, travel=item.travel * zoom)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan) -> None:
    """Sets ``latents_mean`` and ``latents_std`` so that the transformer sees channels of unit variance."""
    rng = random.Random("latent statistics")
    scenes = [training_scene(rng) for _ in range(STATISTICS_CLIPS)]
    modes = [vae.encode(pixels([scene], FRAMES, SIDE, vae.device)).latent_dist.mode() for scene in scenes]
    latents = torch.cat(modes).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


@torch.no_grad()
def video_psnr(vae: AutoencoderKLWan, clips: int = 16) -> list[float]:
    """PSNR in dB of encode-decode on clips whose sentences training never saw, of one and of two objects in turn."""
    single, pair = (held_out(subset, -(-clips // 2), motion=True) for subset in ("single", "pair"))
    sentences = [words for both in zip(single, pair, strict=True) for words in both]
    rng, values = random.Random("held-out reconstruction"), []
    for words in sentences[:clips]:
        video = pixels([sample_scene(rng, words)], FRAMES, SIDE, vae.device)
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        values.append(-10 * float(torch.log10(F.mse_loss(decoded, video) / 4)))
    return values
