"""Wan in its three shapes, Stable Diffusion in four, and others. Untrained, tiny, run to latents only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

VARIANTS = ("t2v", "i2v", "two-experts")
VIDEO_SUBJECTS = ("hunyuan", "cogvideox", "cogvideox1.5")


@dataclass
class Subject:
    """A pipeline and how to run it."""

    pipe: Any
    inputs: dict[str, Any]

    def run(self, seed: int = 1, **changes: Any) -> torch.Tensor:
        """Latents of one generation."""
        generator = torch.Generator().manual_seed(seed)
        output = self.pipe(**(self.inputs | changes), generator=generator, output_type="latent")
        return output.frames if hasattr(output, "frames") else output.images

    @property
    def root(self) -> Any:
        """The transformer or the UNet."""
        return self.pipe.components.get("unet") or self.pipe.components["transformer"]


def build_subject(make_tiny_wan: Callable[[int], Any], variant: str) -> Subject:
    """One of :data:`VARIANTS`."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    stock = make_tiny_wan(0)
    text = {"prompt_embeds": torch.randn(1, 16, 64), "negative_prompt_embeds": torch.randn(1, 16, 64)}
    inputs: dict[str, Any] = text | {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4}
    if variant == "two-experts":
        stock.register_modules(transformer_2=make_tiny_wan(1).transformer)
        stock.register_to_config(boundary_ratio=0.9)
    if variant == "i2v":
        from PIL import Image

        torch.manual_seed(0)
        transformer = WanTransformer3DModel.from_config(dict(stock.transformer.config) | {"in_channels": 36}).eval()
        stock = WanImageToVideoPipeline(
            tokenizer=stock.tokenizer,
            text_encoder=stock.text_encoder,
            vae=stock.vae,
            scheduler=stock.scheduler,
            transformer=transformer,
            image_encoder=None,
            image_processor=None,
        )
        inputs["image"] = Image.new("RGB", (32, 32), "red")
    stock.set_progress_bar_config(disable=True)
    return Subject(stock, inputs)


@pytest.fixture(params=VARIANTS)
def subject(request: pytest.FixtureRequest, make_tiny_wan: Callable[[int], Any]) -> Subject:
    """Every variant in turn."""
    return build_subject(make_tiny_wan, request.param)


@pytest.fixture
def t2v(make_tiny_wan: Callable[[int], Any]) -> Subject:
    """Text to video alone."""
    return build_subject(make_tiny_wan, "t2v")


@pytest.fixture
def i2v(make_tiny_wan: Callable[[int], Any]) -> Subject:
    """Image to video alone."""
    return build_subject(make_tiny_wan, "i2v")


@pytest.fixture
def two_experts(make_tiny_wan: Callable[[int], Any]) -> Subject:
    """Two transformers, one for high and one for low noise."""
    return build_subject(make_tiny_wan, "two-experts")


def embeddings(width: int, pooled: int = 0, count: int = 1) -> dict[str, torch.Tensor]:
    """Random prompts, wanted and unwanted, of ten tokens."""
    inputs = {name: torch.randn(count, 10, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        inputs |= {name: torch.randn(count, pooled)} if pooled else {}
    return inputs


def build_sd3(dual: bool) -> Subject:
    """Two joint blocks of 8 x 6 image tokens and 10 text tokens; ``dual`` gives the first one a second attention."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    absent = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    parts: dict[str, Any] = dict.fromkeys(absent)
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )
    return Subject(pipe, embeddings(32, pooled=24) | {"height": 16, "width": 12, "num_inference_steps": 2})


def build_sd(xl: bool) -> Subject:
    """Stable Diffusion 1.5 or XL on an odd latent of 9 x 13; the UNet attends at that level and at the one below."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    config: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    if xl:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
        }
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1),
        "unet": UNet2DConditionModel(**config).eval(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
    } | dict.fromkeys(("text_encoder", "tokenizer"))
    inputs = embeddings(32, pooled=24 if xl else 0) | {"latents": torch.randn(1, 4, 9, 13), "num_inference_steps": 2}
    if xl:
        return Subject(StableDiffusionXLPipeline(text_encoder_2=None, tokenizer_2=None, **parts), inputs)
    nothing: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor"))
    return Subject(StableDiffusionPipeline(requires_safety_checker=False, **nothing, **parts), inputs)


def build_flux() -> Subject:
    """One double and two single blocks of ten text tokens and 8 x 6 image tokens; true guidance, one call a branch."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(transformer=transformer.eval(), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    inputs = embeddings(32, pooled=24) | {"height": 16, "width": 12, "num_inference_steps": 2, "true_cfg_scale": 2.0}
    return Subject(pipe, inputs)


def build_hunyuan(image: str | None = None) -> Subject:
    """One double and two single blocks of 3 x 4 x 6 video tokens, ten text tokens of which the last three are padding.

    Args:
        image: None for text to video; ``"latent_concat"`` or ``"token_replace"`` for a model of that kind, which is to
            be called without its pipeline.
    """
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 4, 8),
        image_condition_type=image,
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=1
    )
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = HunyuanVideoPipeline(
        transformer=transformer.eval(), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )
    mask = (torch.arange(10) < 7).long()[None]
    inputs = embeddings(32, pooled=24) | {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    size = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "true_cfg_scale": 2.0}
    return Subject(pipe, inputs | size)


def build_cogvideox(joins_frames: bool = False, offset: bool = False) -> Subject:
    """Two joint blocks of ten text tokens and 3 x 4 x 6 video tokens.

    Args:
        joins_frames: as CogVideoX 1.5 does.
        offset: as its model for images, which has an embedding more and is to be called without its pipeline.
    """
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        ofs_embed_dim=8 if offset else None,
        text_embed_dim=32,
        num_layers=2,
        sample_width=24 if joins_frames else 12,  # rotary tables of 1.5 are cut out of those of this size
        sample_height=16 if joins_frames else 8,
        sample_frames=9,
        patch_size_t=2 if joins_frames else None,
        max_text_seq_length=10,
        use_rotary_positional_embeddings=joins_frames,
    )
    vae = AutoencoderKLCogVideoX(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=1,
        temporal_compression_ratio=4,
    )
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )
    size = {"height": 64, "width": 96, "num_frames": 21 if joins_frames else 9, "num_inference_steps": 2}
    return Subject(pipe, embeddings(32) | size)


def build_video_subject(name: str) -> Subject:
    """``"hunyuan"``, ``"cogvideox"`` or ``"cogvideox1.5"``."""
    torch.manual_seed(0)
    subject = build_hunyuan() if name == "hunyuan" else build_cogvideox(joins_frames=name == "cogvideox1.5")
    subject.pipe.set_progress_bar_config(disable=True)
    return subject


@pytest.fixture(scope="session")
def make_video_subject() -> Callable[[str], Subject]:
    """Builds ``"hunyuan"``, ``"cogvideox"`` or ``"cogvideox1.5"``."""
    return build_video_subject


def build_any_subject(name: str) -> Subject:
    """Any image or video model but Wan by its name."""
    return (build_video_subject if name in VIDEO_SUBJECTS else build_image_subject)(name)


@pytest.fixture(scope="session")
def make_any_subject() -> Callable[[str], Subject]:
    """Builds any image or video model but Wan by its name."""
    return build_any_subject


def build_image_subject(name: str) -> Subject:
    """``"flux"``, ``"sd3"``, ``"sd35"``, ``"sd15"`` or ``"sdxl"``."""
    torch.manual_seed(0)
    if name == "flux":
        subject = build_flux()
    else:
        subject = build_sd3(name == "sd35") if name.startswith("sd3") else build_sd(name == "sdxl")
    subject.pipe.set_progress_bar_config(disable=True)
    return subject


@pytest.fixture(scope="session")
def make_image_subject() -> Callable[[str], Subject]:
    """Builds ``"flux"``, ``"sd3"``, ``"sd35"``, ``"sd15"`` or ``"sdxl"``."""
    return build_image_subject
