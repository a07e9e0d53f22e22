"""Stable Diffusion 3 and 3.5: images; image and text tokens attend jointly, the image first.

Some blocks of 3.5 attend a second time (``attn2``), among image tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from .registry import Family, register_family
from .streams import BlockStreams


def _layout(root: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    height, width = (side // root.config.patch_size for side in arguments["hidden_states"].shape[-2:])
    image, text = height * width, arguments["encoder_hidden_states"].shape[1]
    return TokenLayout((1, height, width), (0, image), text=(image, image + text))


def _site_kind(path: str, module: nn.Module) -> str | None:
    if not path.startswith("transformer_blocks."):
        return None
    return "self" if path.endswith(".attn2") else "joint"


def _site_layout(root: Any, path: str, layout: TokenLayout) -> TokenLayout:
    return TokenLayout.video_only(layout.grid) if path.endswith(".attn2") else layout


def _modulated(root: Any, arguments: Mapping[str, Any], block: Any, block_arguments: Mapping[str, Any]) -> Tensor:
    """``[batch, image tokens, channels]``: the input of the first attention."""
    output: Tensor = block.norm1(block_arguments["hidden_states"], emb=block_arguments["temb"])[0]
    return output


SD3 = register_family(
    Family(
        root_class="SD3Transformer2DModel",
        layout=_layout,
        site_kind=_site_kind,
        block_lists=("transformer_blocks",),
        pipeline_roots=("transformer",),
        makes_video=False,
        site_layout=_site_layout,
        block_streams={"transformer_blocks": BlockStreams(("encoder_hidden_states", "hidden_states"))},
        modulated={"default": _modulated},
        mlp_names=("ff", "ff_context"),
    )
)
