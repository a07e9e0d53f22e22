"""Fixtures for all tests: no network, and a whole Wan pipeline small enough to run in a fraction of a second."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from diffusers import WanPipeline


def build_tiny_wan(seed: int = 0) -> WanPipeline:
    """An untrained WanPipeline with every part, 16-wide heads and two layers; speaks the shapes world's words."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    from dit_accel.shapes.recipes import text, wan

    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=text.UMT5_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    return WanPipeline(
        tokenizer=text.build_t5_tokenizer(wan.TEXT_LENGTH),
        text_encoder=text.build_umt5_encoder().eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=wan.build_scheduler(),
    )


@pytest.fixture(scope="session")
def make_tiny_wan() -> Callable[[int], WanPipeline]:
    """The builder itself, for tests that need several pipelines; its argument is the seed of the weights."""
    return build_tiny_wan


@pytest.fixture
def tiny_wan() -> WanPipeline:
    """A fresh tiny pipeline in memory. Call it with ``height=32, width=32, num_frames=9, num_inference_steps=2``."""
    return build_tiny_wan()


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline in diffusers' save format. Read only: tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    build_tiny_wan().save_pretrained(folder)
    return folder
