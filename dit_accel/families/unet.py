"""Stable Diffusion 1.5, 2 and XL: images; a UNet that attends at several resolutions, text in cross-attention.

The root's layout is the latent itself, one token per latent pixel; every site has the grid of its level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..layout import TokenLayout
from .registry import Family, register_family

_SITE = re.compile(
    r"(?P<stage>down_blocks|mid_block|up_blocks)(\.(?P<index>\d+))?\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]"
)


def _layout(root: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    height, width = arguments["sample"].shape[-2:]
    return TokenLayout.video_only((1, height, width))


def _site_kind(path: str, module: Any) -> str | None:
    if _SITE.fullmatch(path) is None:  # gated attention of GLIGEN and the like
        return None
    return "cross" if module.is_cross_attention else "self"


def _site_layout(root: Any, path: str, layout: TokenLayout) -> TokenLayout:
    _, height, width = layout.grid
    # What a 3x3 convolution of stride 2 leaves; upsampling goes back to the very sizes on the way down.
    for _ in range(_level(root, path)):
        height, width = ((side + root.config.downsample_padding) // 2 for side in (height, width))
    return TokenLayout.video_only((1, height, width))


def _level(root: Any, path: str) -> int:
    """How often a site's resolution has been halved."""
    found = _SITE.fullmatch(path)
    assert found is not None  # only sites are asked for
    last, index = len(root.down_blocks) - 1, int(found["index"] or 0)
    return {"down_blocks": index, "mid_block": last, "up_blocks": last - index}[found["stage"]]


UNET = register_family(
    Family(
        root_class="UNet2DConditionModel",
        layout=_layout,
        site_kind=_site_kind,
        block_lists=("down_blocks", "mid_block", "up_blocks"),
        pipeline_roots=("unet",),
        makes_video=False,
        site_layout=_site_layout,
        mlp_names=("ff",),
    )
)
