"""Wan in its three shapes: text to video, image to video, two experts. Untrained, tiny, run to latents only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

VARIANTS = ("t2v", "i2v", "two-experts")


@dataclass
class Subject:
    """A pipeline and how to run it."""

    pipe: Any
    inputs: dict[str, Any]

    def run(self, seed: int = 1, **changes: Any) -> torch.Tensor:
        """Latents of one generation."""
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(**(self.inputs | changes), generator=generator, output_type="latent").frames


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
