"""Wan 2.1 and 2.2: text to video, image to video, one or two experts. Text stays in cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from .registry import Family, Take, TokenStream, register_family
from .streams import BlockStreams


def _layout(root: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch_frames, patch_height, patch_width = root.config.patch_size
    return TokenLayout.video_only((frames // patch_frames, height // patch_height, width // patch_width))


def _site_kind(path: str, module: nn.Module) -> str | None:
    if not path.startswith("blocks."):
        return None
    return "cross" if path.endswith(".attn2") else "self"


def _permute_patches(output: Tensor, take: Take) -> Tensor:
    """``[batch, channels, frames, height, width]``; the model flattens it to tokens without a copy of its own then."""
    tokens = take(output.flatten(2).transpose(1, 2), 1)
    return tokens.transpose(1, 2).unflatten(2, output.shape[2:])


def _permute_rotary(output: tuple[Tensor, Tensor], take: Take) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each ``[1, tokens, 1, head_dim]``."""
    return take(output[0], 1), take(output[1], 1)


def _permute_modulation(output: tuple[Any, ...], take: Take) -> tuple[Any, ...]:
    """Timestep embeddings, by token in Wan 2.2 5B (``[batch, tokens, channels]``), then text and image, which stay."""
    return *(take(part, 1) if part.ndim == 3 else part for part in output[:2]), *output[2:]


def _time_embedding(
    root: Any, arguments: Mapping[str, Any], block: nn.Module, block_arguments: Mapping[str, Any]
) -> Tensor:
    """``[batch, channels]``, by token ``[batch, tokens, channels]`` in Wan 2.2 5B; e in TeaCache.

    In the precision of the embedder, usually float32: rounded to bfloat16, two steps would differ by rounding alone.
    """
    embedder, timestep = root.condition_embedder, arguments["timestep"]
    dtype = next(embedder.time_embedder.parameters()).dtype
    frequencies = embedder.timesteps_proj(timestep.flatten())
    embedding: Tensor = embedder.time_embedder(frequencies.to(dtype) if dtype.is_floating_point else frequencies)
    return embedding.unflatten(0, timestep.shape) if timestep.ndim == 2 else embedding


def _time_projection(
    root: Any, arguments: Mapping[str, Any], block: nn.Module, block_arguments: Mapping[str, Any]
) -> Tensor:
    """``[batch, 6, channels]``, by token ``[batch, tokens, 6, channels]`` in Wan 2.2 5B; e0 in TeaCache."""
    projection: Tensor = block_arguments["temb"]
    return projection


WAN = register_family(
    Family(
        root_class="WanTransformer3DModel",
        layout=_layout,
        site_kind=_site_kind,
        block_lists=("blocks",),
        token_stream=TokenStream(
            makers={
                "patch_embedding": _permute_patches,
                "rope": _permute_rotary,
                "condition_embedder": _permute_modulation,
            },
            exit="proj_out",
        ),
        block_streams={"blocks": BlockStreams(("hidden_states",), bare=True)},
        modulated={"default": _time_embedding, "projection": _time_projection},
        mlp_names=("ffn",),
    )
)
