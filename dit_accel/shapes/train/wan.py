"""Trains the text encoder and the video transformer together, small clips first, then full ones among them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

from ..recipes.text import build_t5_tokenizer, build_umt5_encoder
from ..recipes.wan import TEXT_LENGTH, build_transformer
from .counted_padding import CountedPadding
from .devices import autocast, settings_for
from .images import run_of
from .latents import FULL, SMALL, ClipSize, EncodedClips, encoded_clips
from .loop import LoopConfig, Trainer, going_on
from .muon import Muon

SMALL_PART = 0.6  # of the steps train on small clips alone; after it full clips join
FULL_SHARE = 0.9  # of the steps that follow


class TextConditioned(nn.Module):
    """Text encoder and transformer as one module, so that one optimizer and one checkpoint hold both."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = build_umt5_encoder()
        self.transformer = build_transformer()

    def load_pipeline(self, folder: Path) -> None:
        """Takes over the weights of a finished pipeline.

        Raises:
            ValueError: if they are of another architecture or of another vocabulary.
        """
        text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
        try:
            self.text_encoder.load_state_dict(text_encoder.state_dict())
            self.transformer.load_state_dict(transformer.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"{folder} has other sizes or words than dit_accel/shapes/recipes; train without --init"
            ) from error

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Predicted velocity of ``latents`` ``[B, C, F, H, W]`` at noise level ``sigma`` ``[B]``."""
        text = self.text_encoder(tokens, _score_mask(mask)).last_hidden_state * mask[..., None]
        text = torch.cat([text, torch.zeros_like(text[:, :1])], 1)
        CountedPadding.set_bias(self.transformer, mask)
        return self.transformer(latents, timestep=sigma * 1000, encoder_hidden_states=text).sample


def _score_mask(mask: torch.Tensor) -> torch.Tensor:
    """``[B, L]`` as what is added to scores ``[B, 1, 1, L]``; of the former transformers reads values, which waits."""
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, lowest)[:, None, None]


def train_wan(
    folder: Path, vae_folder: Path, steps: int | None = None, device: str = "cpu", init: Path | None = None
) -> None:
    """Trains or resumes; the result is the moving average in ``folder / 'checkpoint.pt'``, which ``export`` reads.

    Args:
        folder: checkpoint, log and encoded clips.
        vae_folder: the trained autoencoder.
        steps: optimizer steps in all; None takes the device's usual number.
        device: where to render, encode and train.
        init: pipeline folder whose text encoder and transformer to start from, on full clips at once; None starts from
            random weights, on small clips.

    Raises:
        ValueError: if ``init`` or the checkpoint is of another architecture, or the checkpoint is of another run: of
            other steps, another start, autoencoder or kind of device.
    """
    vae = AutoencoderKLWan.from_pretrained(vae_folder)
    torch.manual_seed(0)
    model = TextConditioned()
    if init is not None:
        model.load_pipeline(init)
    model.train().to(device)
    settings = settings_for(device)
    steps = steps or settings.wan_steps
    fresh = LoopConfig(steps=steps, warmup=200)
    loop = fresh if init is None else going_on(fresh)
    trainer = Trainer(model, optimizers(model), loop, folder, run_of(device, vae, model, init))
    CountedPadding.install(model.transformer)
    clips = _ClipSets(vae, folder, device)

    def loss_at(step: int) -> torch.Tensor:
        rng = random.Random(f"batch {step}")
        size = clip_size(step / steps, rng) if init is None else FULL
        part = rng.choices(size.parts, [part.share for part in size.parts])[0]
        clean, tokens, mask = clips[size].draw(part.latent_frames, part.batch * settings.batch_factor)
        return flow_loss(model, clean, tokens, mask, part.shift)

    trainer.fit(loss_at)


def clip_size(progress: float, rng: random.Random) -> ClipSize:
    """Which clips a step trains on, ``progress`` (0 to 1) into a run from random weights."""
    return FULL if progress > SMALL_PART and rng.random() < FULL_SHARE else SMALL


class _ClipSets(dict[ClipSize, EncodedClips]):
    """The sets of both sizes, each encoded or loaded when a step first needs it."""

    def __init__(self, vae: AutoencoderKLWan, folder: Path, device: str) -> None:
        super().__init__()
        self.vae, self.folder, self.device = vae, folder, device

    def __missing__(self, size: ClipSize) -> EncodedClips:
        settings = settings_for(self.device)
        count = settings.full_clips if size == FULL else settings.small_clips
        latents, prompts = encoded_clips(self.vae, size, count, self.folder, self.device)
        self[size] = EncodedClips(latents, prompts, build_t5_tokenizer(TEXT_LENGTH), self.device)
        return self[size]


def flow_loss(
    model: TextConditioned, clean: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, shift: float
) -> torch.Tensor:
    """Mean squared error of the predicted velocity along the straight path from data to noise."""
    sigma = shifted_sigmas(len(clean), shift, clean.device)
    noise = torch.randn_like(clean)
    with autocast(clean.device):
        velocity = model(torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1)), sigma, tokens, mask)
    return F.mse_loss(velocity.float(), noise - clean)


def shifted_sigmas(batch: int, shift: float, device: torch.device | str) -> torch.Tensor:
    """Noise levels for training: uniform, pushed towards noise by ``shift``; ``[batch]`` in [0, 1)."""
    sigma = torch.rand(batch, device=device)
    return shift * sigma / (1 + (shift - 1) * sigma)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if "transformer.blocks." in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=2e-3), torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)]
