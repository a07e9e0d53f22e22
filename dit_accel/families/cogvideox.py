"""CogVideoX and CogVideoX 1.5: videos from text and images; text and video tokens attend jointly, the text first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from .registry import Family, register_family
from .streams import BlockStreams


def _layout(root: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    _, frames, _, height, width = arguments["hidden_states"].shape  # frames before channels
    patch, patch_frames = root.config.patch_size, root.config.patch_size_t or 1  # only 1.5 joins frames
    grid = (frames // patch_frames, height // patch, width // patch)
    text = arguments["encoder_hidden_states"].shape[1]
    return TokenLayout(grid, (text, text + grid[0] * grid[1] * grid[2]), text=(0, text) if text else None)


def _site_kind(path: str, module: nn.Module) -> str | None:
    return "joint" if path.startswith("transformer_blocks.") else None


def _time_embedding(
    root: Any, arguments: Mapping[str, Any], block: nn.Module, block_arguments: Mapping[str, Any]
) -> Tensor:
    """``[batch, channels]``, as every block gets it; TeaCache looks at this one here, not at modulated tokens."""
    embedding: Tensor = block_arguments["temb"]
    return embedding


COGVIDEOX = register_family(
    Family(
        root_class="CogVideoXTransformer3DModel",
        layout=_layout,
        site_kind=_site_kind,
        block_lists=("transformer_blocks",),
        pipeline_roots=("transformer",),
        text_first=True,
        block_streams={"transformer_blocks": BlockStreams(("hidden_states", "encoder_hidden_states"))},
        modulated={"default": _time_embedding},
        mlp_names=("ff",),  # over text and video tokens together
    )
)
