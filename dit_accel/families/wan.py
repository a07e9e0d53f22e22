"""Wan 2.1 and 2.2: text to video, image to video, one or two experts. Text stays in cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layout import TokenLayout
from .registry import Family, register_family


def _layout(root: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch_frames, patch_height, patch_width = root.config.patch_size
    return TokenLayout.video_only((frames // patch_frames, height // patch_height, width // patch_width))


def _site_kind(path: str, module: nn.Module) -> str | None:
    if not path.startswith("blocks."):
        return None
    return "cross" if path.endswith(".attn2") else "self"


WAN = register_family(
    Family(root_class="WanTransformer3DModel", layout=_layout, site_kind=_site_kind, block_lists=("blocks",))
)
