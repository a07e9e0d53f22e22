"""Cross-attention over padded prompts, at the cost of their words."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from ..recipes.wan import TEXT_LENGTH


class CountedPadding(WanAttnProcessor):
    """Cross-attention over the real tokens and one padding token that counts for all of them.

    ``WanPipeline`` pads prompts to 512 tokens with zeros; 500 equal keys weigh what one key with ``log 500`` added to
    its score weighs, at a small part of the cost.
    """

    bias: torch.Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As the stock processor, with the count added to the scores."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)

    @classmethod
    def install(cls, transformer: Any) -> None:
        """Puts one on every cross-attention."""
        for block in transformer.blocks:
            block.attn2.set_processor(cls())

    @staticmethod
    def set_bias(transformer: Any, mask: torch.Tensor) -> None:
        """Tells every cross-attention which tokens are real, ``mask`` ``[B, L]`` (the padding token follows them)."""
        real = torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, -math.inf)
        padding = torch.log(TEXT_LENGTH - mask.sum(1, keepdim=True))
        bias = torch.cat([real, padding], 1)[:, None, None]
        if torch.is_autocast_enabled(mask.device.type):
            bias = bias.to(torch.get_autocast_dtype(mask.device.type))
        for block in transformer.blocks:
            block.attn2.processor.bias = bias
