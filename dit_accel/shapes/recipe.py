"""The parts of the ``shapes-wan`` pipeline, untrained: sizes are chosen here and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, TEMPLATE

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

LATENT_CHANNELS = 16
TEXT_WIDTH = 64
TEXT_LENGTH = 512  # what WanPipeline pads every prompt to
SHIFT = 12.0  # of the sampling schedule; at full size, place and motion are settled at noise levels above 0.98


def build_vae() -> AutoencoderKLWan:
    """A video autoencoder that shrinks space by 8 and time by 4, as Wan 2.1 does, at a hundredth of its size."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def build_transformer() -> WanTransformer3DModel:
    """A Wan transformer of 3.3 M parameters; head size 64, as in large models, so that kernels meet real tiles."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=128,
    )


def vocabulary() -> dict[str, int]:
    """Word to token id: padding, end of sentence, unknown, then every word the grammar can produce."""
    grammar = [word for word in TEMPLATE.split() if "{" not in word]
    words = ["<pad>", "</s>", "<unk>", *grammar, *COLORS, *SHAPES, *MOTIONS, *BACKGROUNDS]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words for the closed vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def build_text_encoder() -> UMT5EncoderModel:
    """A two-layer UMT5 encoder for the closed vocabulary."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(vocabulary()),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return UMT5EncoderModel(config)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along the flow, shifted as in training."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def shifted_sigmas(batch: int, shift: float) -> torch.Tensor:
    """Noise levels for training: uniform, pushed towards noise by ``shift``; ``[batch]`` in [0, 1)."""
    sigma = torch.rand(batch)
    return shift * sigma / (1 + (shift - 1) * sigma)
