"""A model that is affine in time: what its blocks add lies on a straight line, which Taylor(1) continues exactly."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from dit_accel.families import Family, register_family
from dit_accel.families.streams import BlockStreams
from dit_accel.layout import TokenLayout

WIDTH, TOKENS = 8, 6


class AffineBlock(nn.Module):
    """``x + W x + a + t b``, and attention over what never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.slope = nn.Parameter(torch.randn(WIDTH))
        self.still = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.attn = Attention(WIDTH, heads=2, dim_head=4)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """Tokens ``[batch, tokens, channels]`` to tokens."""
        return hidden_states + self.linear(hidden_states) + timestep * self.slope + self.attn(self.still)


class AffineModel(nn.Module, CacheMixin):
    """Three such blocks between two linear layers, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(AffineBlock() for _ in range(3))
        self.double().requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        """Latents ``[batch, tokens, channels]`` to an output of that shape."""
        x = self.before(hidden_states)
        for block in self.blocks:
            x = block(x, timestep)
        return (self.after(x),)


def _layout(root: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout.video_only((1, 2, TOKENS // 2))


register_family(
    Family(
        "AffineModel",
        _layout,
        lambda path, module: "self" if path.endswith("attn") else None,
        ("blocks",),
        makes_video=False,
        block_streams={"blocks": BlockStreams(("hidden_states",), bare=True)},
    )
)


class AffinePipeline:
    """Enough of a pipeline: a model, and a scheduler with times and noise levels that are not evenly spaced.

    Args:
        times: of the steps, which are also the noise levels.
    """

    def __init__(self, times: Tensor) -> None:
        torch.manual_seed(0)
        self.components: dict[str, Any] = {"transformer": AffineModel()}
        self.start, self.drift = torch.randn(2, 1, TOKENS, WIDTH, dtype=torch.float64)
        self.times = times
        self.scheduler = SimpleNamespace()

    def run(self) -> list[Tensor]:
        """The model's output at every step; its input moves on a straight line, whatever the output is."""
        root = self.components["transformer"]
        self.scheduler.timesteps, self.scheduler.sigmas = self.times.clone(), self.times.clone()
        outputs = []
        for step, time in enumerate(self.times):
            self.scheduler.step_index = step
            with root.cache_context("cond"):
                outputs.append(root(self.start + time * self.drift, time)[0].clone())
        return outputs
