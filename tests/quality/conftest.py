"""A pipeline that samples in milliseconds: a tiny Wan transformer, and pixels made straight from the latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

PROMPTS = ["a red circle", "two blue squares"]
HELD_OUT = ["a white cat", "seven black dots of ink"]


class TinyPipeline:
    """Text to video in the form of diffusers' pipelines, with guidance in two calls per step."""

    def __init__(self, scheduler: Any = None, drift: float = 0.0) -> None:
        torch.manual_seed(0)
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        ).eval()
        with torch.no_grad():  # an untrained head says next to nothing, so errors would not show
            self.transformer.proj_out.weight.mul_(20)
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.config = {"_name_or_path": "tiny/pipeline"}
        self.calls: list[str] = []
        self._drift, self._guidance_scale = drift, 1.0

    @property
    def components(self) -> dict[str, Any]:
        """As diffusers' pipelines have it."""
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        num_inference_steps: int = 10,
        guidance_scale: float = 2.0,
        size: int = 12,
        num_frames: int = 2,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Any:
        """Euler steps; each prompt has an embedding of its own."""
        assert output_type == "pt" and not return_dict
        self.calls.append(prompt)
        self._guidance_scale = guidance_scale
        text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(sum(map(ord, prompt))))
        latents = torch.randn(1, 4, num_frames, size // 2, size // 2, generator=generator)
        latents = latents + self._drift * len(self.calls)
        self.scheduler.set_timesteps(num_inference_steps)
        for index, time in enumerate(self.scheduler.timesteps):
            cond = self._model(latents, time, text, "cond")
            uncond = self._model(latents, time, torch.zeros_like(text), "uncond")
            velocity = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, time, {"latents": latents})["latents"]
        frames = (latents[:, :3].transpose(1, 2) / 6 + 0.5).clamp(0, 1)
        return (frames,)

    def _model(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor, name: str) -> torch.Tensor:
        with self.transformer.cache_context(name):
            found: torch.Tensor = self.transformer(latents, time[None], text, return_dict=False)[0]
        return found


@pytest.fixture
def pipe() -> TinyPipeline:
    """A fresh one; call it with ``num_inference_steps=12``."""
    return TinyPipeline()
