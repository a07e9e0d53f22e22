"""The parts of the ``shapes-sd3`` pipeline: joint attention over the text of three encoders and 1,024 image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .image_vae import IMAGE_SIDE, LATENT_CHANNELS, SHRINK, build_image_vae
from .text import build_clip_projection_encoder, build_clip_tokenizer, build_t5_encoder, build_t5_tokenizer

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

T5_LENGTH = 256  # what StableDiffusion3Pipeline pads the third prompt to, unless its caller says otherwise
CLIP_WIDTH = 64
CLIP_LAYERS = 3
TEXT_WIDTH = 2 * CLIP_WIDTH  # of T5, and of both CLIP encoders side by side
HEADS = 3
SHIFT = 6.0  # of the sampling schedule; places and colors are settled at noise levels above 0.9


def build_transformer() -> SD3Transformer2DModel:
    """An SD3 transformer of 5.1 M parameters; head size 64, as in large models, so that kernels meet real tiles."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=IMAGE_SIDE // SHRINK,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=64 * HEADS,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=48,  # images of up to 384 pixels a side
        qk_norm="rms_norm",
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along the flow, shifted as in training."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def build_pipeline() -> StableDiffusion3Pipeline:
    """The whole pipeline with random weights."""
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=build_scheduler(),
        vae=build_image_vae(),
        text_encoder=build_clip_projection_encoder(CLIP_WIDTH, CLIP_LAYERS),
        tokenizer=build_clip_tokenizer(),
        text_encoder_2=build_clip_projection_encoder(CLIP_WIDTH, CLIP_LAYERS),
        tokenizer_2=build_clip_tokenizer(),
        text_encoder_3=build_t5_encoder(TEXT_WIDTH),
        tokenizer_3=build_t5_tokenizer(T5_LENGTH),
    )
