"""Trains the text encoder and the UNet of ``shapes-sd15`` together, by velocity prediction."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn

from ..recipes.sd15 import TRAIN_TIMESTEPS, build_pipeline
from .devices import autocast
from .images import Curriculum, EncodedImages, optimizers, run_of
from .loop import LoopConfig, Trainer, going_on

CURRICULUM = Curriculum(steps=12000, small_part=0.7, full_share=0.8, small_batch=12, full_batch=3)


class Sd15Model(nn.Module):
    """The trained parts of a pipeline as one module, so that one optimizer and one checkpoint hold them.

    Args:
        pipe: whose parts to train.
    """

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        super().__init__()
        self.pipe = pipe
        self.text_encoder, self.unet = pipe.text_encoder, pipe.unet

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Predicted velocity of ``latents`` ``[B, C, H, W]`` at ``timesteps`` ``[B]``; B prompts."""
        text, _ = self.pipe.encode_prompt(prompts, latents.device, 1, do_classifier_free_guidance=False)
        return self.unet(latents, timesteps, encoder_hidden_states=text).sample


def train_sd15(
    folder: Path, vae_folder: Path, steps: int | None = None, device: str = "cpu", init: Path | None = None
) -> None:
    """Trains or resumes; the result is the moving average in ``folder / 'checkpoint.pt'``, for :func:`.export_sd15`.

    Args:
        folder: checkpoint, log and encoded images.
        vae_folder: the trained autoencoder.
        steps: optimizer steps in all; None takes the usual number.
        device: where to train.
        init: pipeline folder whose text encoder and UNet to start from, with full images among small ones
            at once; None starts from random weights, on small images.

    Raises:
        ValueError: if the checkpoint is of another run: of other steps, another start, autoencoder or kind of device.
    """
    vae = AutoencoderKL.from_pretrained(vae_folder)
    torch.manual_seed(0)
    steps = steps or CURRICULUM.steps_on(device)
    pipe = build_pipeline() if init is None else StableDiffusionPipeline.from_pretrained(init)
    model = Sd15Model(pipe).train().to(device)
    fresh = LoopConfig(steps=steps, warmup=200)
    loop = fresh if init is None else going_on(fresh)
    trainer = Trainer(model, optimizers(model, 1e-3, 1e-3), loop, folder, run_of(device, vae, model, init))
    images = EncodedImages(vae, folder, device)

    def loss_at(step: int) -> torch.Tensor:
        rng = random.Random(f"batch {step}")
        size, batch = CURRICULUM.at(step / steps if init is None else 1.0, device, rng)
        latents, prompts = images.draw(size, batch, rng)
        return velocity_loss(model, latents * vae.config.scaling_factor, prompts)

    trainer.fit(loss_at)


def velocity_loss(model: Sd15Model, clean: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Mean squared error of the predicted velocity, at timesteps drawn evenly."""
    scheduler = model.pipe.scheduler
    timesteps = torch.randint(TRAIN_TIMESTEPS, (len(clean),), device=clean.device)
    noise = torch.randn_like(clean)
    with autocast(clean.device):
        velocity = model(scheduler.add_noise(clean, noise, timesteps), timesteps, prompts)
    return F.mse_loss(velocity.float(), scheduler.get_velocity(clean, noise, timesteps))
