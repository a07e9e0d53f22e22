"""Trains the three text encoders and the transformer of ``shapes-sd3`` together, by flow matching."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

from ..recipes.sd3 import SHIFT, T5_LENGTH, build_pipeline
from .devices import autocast
from .images import FULL, SMALL, Curriculum, EncodedImages, ImageSet, optimizers, run_of
from .loop import LoopConfig, Trainer, going_on
from .wan import shifted_sigmas

CURRICULUM = Curriculum(steps=12000, small_part=0.6, full_share=0.8, small_batch=24, full_batch=6)
SHIFTS = {SMALL: 3.5, FULL: SHIFT}  # of the noise levels; larger images need more noise before they are unrecognisable
# The pipeline pads T5's text to 256 tokens and masks nothing. Short padding teaches the words at half the cost of a
# small image; some of the steps and all full images see the padding that callers will.
SHORT_T5, SHORT_SHARE = 32, 0.75


class Sd3Model(nn.Module):
    """The trained parts of a pipeline as one module, so that one optimizer and one checkpoint hold them.

    Args:
        pipe: whose parts to train.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline) -> None:
        super().__init__()
        self.pipe = pipe
        self.text_encoder, self.text_encoder_2 = pipe.text_encoder, pipe.text_encoder_2
        self.text_encoder_3, self.transformer = pipe.text_encoder_3, pipe.transformer

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, prompts: list[str], t5_length: int = T5_LENGTH
    ) -> torch.Tensor:
        """Predicted velocity of ``latents`` ``[B, C, H, W]`` at noise level ``sigma`` ``[B]``; B prompts."""
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=latents.device,
            do_classifier_free_guidance=False,
            max_sequence_length=t5_length,
        )
        return self.transformer(
            hidden_states=latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=sigma * 1000
        ).sample


def train_sd3(
    folder: Path, vae_folder: Path, steps: int | None = None, device: str = "cpu", init: Path | None = None
) -> None:
    """Trains or resumes; the result is the moving average in ``folder / 'checkpoint.pt'``, for :func:`.export_sd3`.

    Args:
        folder: checkpoint, log and encoded images.
        vae_folder: the trained autoencoder.
        steps: optimizer steps in all; None takes the usual number.
        device: where to train.
        init: pipeline folder whose text encoders and transformer to start from, with full images among small ones
            at once; None starts from random weights, on small images.

    Raises:
        ValueError: if the checkpoint is of another run: of other steps, another start, autoencoder or kind of device.
    """
    vae = AutoencoderKL.from_pretrained(vae_folder)
    torch.manual_seed(0)
    steps = steps or CURRICULUM.steps_on(device)
    pipe = build_pipeline() if init is None else StableDiffusion3Pipeline.from_pretrained(init)
    if init is None:
        close_gates(pipe.transformer)
    model = Sd3Model(pipe).train().to(device)
    fresh = LoopConfig(steps=steps, warmup=200)
    loop = fresh if init is None else going_on(fresh)
    trainer = Trainer(model, optimizers(model, 2e-3, 1.5e-3), loop, folder, run_of(device, vae, model, init))
    images = EncodedImages(vae, folder, device)

    def loss_at(step: int) -> torch.Tensor:
        rng = random.Random(f"batch {step}")
        size, batch = CURRICULUM.at(step / steps if init is None else 1.0, device, rng)
        latents, prompts = images.draw(size, batch, rng)
        clean = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return flow_loss(model, clean, prompts, SHIFTS[size], t5_length(size, rng))

    trainer.fit(loss_at)


def flow_loss(model: Sd3Model, clean: torch.Tensor, prompts: list[str], shift: float, t5_length: int) -> torch.Tensor:
    """Mean squared error of the predicted velocity along the straight path from data to noise."""
    sigma = shifted_sigmas(len(clean), shift, clean.device)
    noise = torch.randn_like(clean)
    with autocast(clean.device):
        velocity = model(torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1)), sigma, prompts, t5_length)
    return F.mse_loss(velocity.float(), noise - clean)


def t5_length(size: ImageSet, rng: random.Random) -> int:
    """Number of tokens that T5's text is padded to in one step."""
    return SHORT_T5 if size == SMALL and rng.random() < SHORT_SHARE else T5_LENGTH


def close_gates(transformer: SD3Transformer2DModel) -> None:
    """Lets every block start as the identity, as DiT does (Peebles and Xie, arXiv 2212.09748)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (".norm" in name or name.startswith(("norm_out", "proj_out"))):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
