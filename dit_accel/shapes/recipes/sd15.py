"""The parts of the ``shapes-sd15`` pipeline: a UNet with self-attention over 4,096 tokens at its highest level."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .image_vae import IMAGE_SIDE, LATENT_CHANNELS, SHRINK, build_image_vae
from .text import build_clip_encoder, build_clip_tokenizer

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

TEXT_WIDTH = 128
TEXT_LAYERS = 2
WIDTHS = (64, 96, 128)
HEAD_SIZE = 32
TRAIN_TIMESTEPS = 1000


def build_unet() -> UNet2DConditionModel:
    """A UNet of 4.8 M parameters, with self- and cross-attention at its two higher levels and in the middle."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIDE // SHRINK,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=tuple(width // HEAD_SIZE for width in WIDTHS),  # the number of heads, by its historic name
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM from pure noise, with velocity as the target.

    Black and white backgrounds need a schedule that ends in noise alone, and then the noise says nothing about the
    image, so the velocity is predicted (Lin et al., arXiv 2305.08891). The linear schedule of the first diffusion
    models spends two fifths of its steps where an image is five times weaker than its noise, and smooth images are
    settled there; the usual one of Stable Diffusion spends a sixth.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.02,
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def build_pipeline() -> StableDiffusionPipeline:
    """The whole pipeline with random weights."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=build_image_vae(),
        text_encoder=build_clip_encoder(TEXT_WIDTH, TEXT_LAYERS),
        tokenizer=build_clip_tokenizer(),
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
