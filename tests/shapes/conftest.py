"""Tiny untrained pipelines of all three kinds, in diffusers' format, with the ``shapes.json`` of the shapes zoo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

INFO: dict[str, Any] = {
    "subset": "all",
    "motion": True,
    "frames": 5,
    "height": 64,
    "width": 96,
    "steps": 2,
    "guidance": 3.0,
    "fps": 8,
    "attention": {"dense_steps": 0.24, "dense_layers": 1, "block": 64, "decay": 0.2},
}
IMAGE = {"motion": False, "frames": 1, "fps": None}


def only(*names: str) -> list[str]:
    """Options that choose rows of a table."""
    return [part for name in names for part in ("--only", name)]


class Stop(Exception):
    """Stands for a machine that goes away."""


class Calls(list[tuple[int, str]]):
    """Prompt and way of every sample; the machine goes away at the one of number ``last``, if there is one."""

    last: int | None = None


def write_info(folder: Path, **changes: Any) -> Path:
    """Says in a pipeline's folder what it was trained on."""
    (folder / "shapes.json").write_text(json.dumps(INFO | changes))
    return folder


def build_tiny_sd3() -> Any:
    """An untrained StableDiffusion3Pipeline of one layer with all three text encoders."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    from dit_accel.shapes.recipes import text

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1, shift_factor=0.0),
        text_encoder=text.build_clip_projection_encoder(32, 2),
        tokenizer=text.build_clip_tokenizer(),
        text_encoder_2=text.build_clip_projection_encoder(32, 2),
        tokenizer_2=text.build_clip_tokenizer(),
        text_encoder_3=text.build_t5_encoder(64),
        tokenizer_3=text.build_t5_tokenizer(32),
    )


def build_tiny_sd15() -> Any:
    """An untrained StableDiffusionPipeline with one level of cross-attention."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from dit_accel.shapes.recipes import text

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.build_clip_encoder(32, 2),
        tokenizer=text.build_clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def shapes_wan(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained text-to-video pipeline that claims to know every sentence. Read only."""
    return write_info(Path(shutil.copytree(tiny_wan_folder, tmp_path_factory.mktemp("zoo") / "wan")))


@pytest.fixture(scope="session")
def basic_wan(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, said to know basic sentences only. Read only."""
    folder = Path(shutil.copytree(tiny_wan_folder, tmp_path_factory.mktemp("zoo") / "basic-wan"))
    return write_info(folder, subset="basic")


@pytest.fixture(scope="session")
def shapes_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained text-to-image pipeline with joint attention. Read only."""
    folder = tmp_path_factory.mktemp("zoo") / "sd3"
    build_tiny_sd3().save_pretrained(folder)
    return write_info(folder, **IMAGE)


@pytest.fixture(scope="session")
def shapes_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained text-to-image pipeline with a UNet. Read only."""
    folder = tmp_path_factory.mktemp("zoo") / "sd15"
    build_tiny_sd15().save_pretrained(folder)
    return write_info(folder, **IMAGE)
