"""Trains the text encoder and the video transformer together, small clips first, then full ones among them."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn
from transformers import UMT5EncoderModel

from ..recipe import TEXT_LENGTH, build_text_encoder, build_tokenizer, build_transformer, shifted_sigmas
from .latents import FULL, SMALL, ClipSize, Part, encoded_clips
from .loop import LoopConfig, Trainer

SMALL_PART = 0.6  # of the steps train on small clips alone; after it full clips join
FULL_SHARE = 0.9  # of the steps that follow
PROMPT_DROPOUT = 0.1  # share of empty prompts, which classifier-free guidance needs


class TextConditioned(nn.Module):
    """Text encoder and transformer as one module, so that one optimizer and one checkpoint hold both."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder()
        self.transformer = build_transformer()

    def load_pipeline(self, folder: Path) -> None:
        """Takes over the weights of a finished pipeline."""
        text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
        self.text_encoder.load_state_dict(text_encoder.state_dict())
        self.transformer.load_state_dict(transformer.state_dict())

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Predicted velocity of ``latents`` ``[B, C, F, H, W]`` at noise level ``sigma`` ``[B]``."""
        text = self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        text = torch.cat([text, torch.zeros_like(text[:, :1])], 1)
        CountedPadding.set_bias(self.transformer, mask)
        return self.transformer(latents, timestep=sigma * 1000, encoder_hidden_states=text).sample


class CountedPadding(WanAttnProcessor):
    """Cross-attention over the real tokens and one padding token that counts for all of them.

    ``WanPipeline`` pads prompts to 512 tokens with zeros; 500 equal keys weigh what one key with ``log 500`` added to
    its score weighs, at a fortieth of the cost.
    """

    bias: torch.Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As the stock processor, with the count added to the scores."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)

    @classmethod
    def install(cls, transformer: Any) -> None:
        """Puts one on every cross-attention."""
        for block in transformer.blocks:
            block.attn2.set_processor(cls())

    @staticmethod
    def set_bias(transformer: Any, mask: torch.Tensor) -> None:
        """Tells every cross-attention which tokens are real, ``mask`` ``[B, L]`` (the padding token follows them)."""
        bias = torch.full((*mask.shape[:1], mask.shape[1] + 1), -math.inf)
        bias[:, :-1].masked_fill_(mask.bool().cpu(), 0.0)
        bias[:, -1] = torch.log(TEXT_LENGTH - mask.sum(1).cpu())
        bias = bias[:, None, None].to(mask.device)
        if torch.is_autocast_enabled(mask.device.type):
            bias = bias.to(torch.bfloat16)
        for block in transformer.blocks:
            block.attn2.processor.bias = bias


def train_wan(
    folder: Path, vae_folder: Path, steps: int = 4400, device: str = "cpu", init: Path | None = None
) -> None:
    """Trains or resumes; the result is the moving average in ``folder / 'checkpoint.pt'``, which ``export`` reads.

    Args:
        folder: checkpoint, log and encoded clips.
        vae_folder: the trained autoencoder.
        steps: optimizer steps in all.
        device: where to train.
        init: pipeline folder whose text encoder and transformer to start from; None starts from random weights.
    """
    vae = AutoencoderKLWan.from_pretrained(vae_folder).eval()
    torch.manual_seed(0)
    model = TextConditioned()
    if init is not None:
        model.load_pipeline(init)
    model.to(device)
    trainer = Trainer(model, optimizers(model), LoopConfig(steps=steps, warmup=200), folder)
    CountedPadding.install(model.transformer)
    tokenizer = build_tokenizer()
    data: dict[ClipSize, dict[str, Any]] = {}

    def loss_at(step: int) -> torch.Tensor:
        rng = random.Random(f"batch {step}")
        size = FULL if step > SMALL_PART * steps and rng.random() < FULL_SHARE else SMALL
        if size not in data:
            data[size] = encoded_clips(vae, size, folder, device)
        part = rng.choices(size.parts, [part.share for part in size.parts])[0]
        clean, prompts = draw(data[size], part, rng)
        text = tokenizer(prompts, padding=True, return_tensors="pt").to(device)
        return flow_loss(model, clean.to(device), text.input_ids, text.attention_mask, part.shift)

    trainer.fit(loss_at)


def draw(data: dict[str, Any], part: Part, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
    """A batch of latents and prompts; some prompts are emptied."""
    chosen = [rng.randrange(len(data["prompts"])) for _ in range(part.batch)]
    prompts = ["" if rng.random() < PROMPT_DROPOUT else data["prompts"][index] for index in chosen]
    return data["latents"][chosen, :, : part.latent_frames].float(), prompts


def flow_loss(
    model: TextConditioned, clean: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, shift: float
) -> torch.Tensor:
    """Mean squared error of the predicted velocity along the straight path from data to noise."""
    sigma = shifted_sigmas(len(clean), shift).to(clean.device)
    noise = torch.randn_like(clean)
    level = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast(clean.device.type, torch.bfloat16):
        velocity = model((1 - level) * clean + level * noise, sigma, tokens, mask)
    return (velocity.float() - (noise - clean)).square().mean()


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    return [muon, adamw]
