"""The parts of the ``shapes-wan`` pipeline: text to video with separate cross-attention, over a video autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .text import UMT5_WIDTH, build_t5_tokenizer, build_umt5_encoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

FRAMES, SIDE = 33, 256  # of the default clip
LATENT_CHANNELS = 16
TEXT_LENGTH = 512  # what WanPipeline pads every prompt to
LAYERS, HEADS = 8, 3
SHIFT = 12.0  # of the sampling schedule; at full size, place and motion are settled at noise levels above 0.98


def build_video_vae() -> AutoencoderKLWan:
    """A video autoencoder of 2.5 M parameters that shrinks space by 8 and time by 4.

    Every level has a shortcut that folds space and time into channels, as in Wan 2.2: an untrained one then passes
    colors and places on, and the convolutions only have to learn the rest.
    """
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def build_transformer() -> WanTransformer3DModel:
    """A Wan transformer of 4.2 M parameters; head size 64, as in large models, so that kernels meet real tiles."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=UMT5_WIDTH,
        freq_dim=64,
        ffn_dim=480,
        num_layers=LAYERS,
        rope_max_seq_len=128,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along the flow, shifted as in training."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def build_pipeline() -> WanPipeline:
    """The whole pipeline with random weights."""
    from diffusers import WanPipeline

    return WanPipeline(
        tokenizer=build_t5_tokenizer(TEXT_LENGTH),
        text_encoder=build_umt5_encoder(),
        vae=build_video_vae(),
        transformer=build_transformer(),
        scheduler=build_scheduler(),
    )
