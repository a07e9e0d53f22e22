"""HunyuanVideo: videos from text and images; video and text tokens attend jointly, the video first.

Every attention call has a mask, which hides the padding of the text: the last tokens of the sequence. Variants that
start from an image join it to the channels, or put it in place of the first frame (``token_replace``); the tokens are
the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from .reading import ReadOnce
from .registry import Family, register_family
from .streams import BlockStreams


def _layout(root: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch, patch_frames = root.config.patch_size, root.config.patch_size_t
    grid = (frames // patch_frames, height // patch, width // patch)
    video, text = grid[0] * grid[1] * grid[2], arguments["encoder_hidden_states"].shape[1]
    return TokenLayout(grid, (0, video), text=(video, video + text) if text else None)


def _padding(root: Any, arguments: Mapping[str, Any]) -> int | None:
    """Tokens of the text that the mask hides; None if samples of the batch have texts of different lengths."""
    mask = arguments.get("encoder_attention_mask")
    return None if mask is None else _read_padding(mask)


def _count_padding(mask: Tensor) -> int | None:
    """The model counts what its mask keeps, and hides as many tokens at the end, wherever the gaps in it are."""
    lengths = set(mask.sum(dim=1, dtype=torch.int).tolist())
    return mask.shape[1] - lengths.pop() if len(lengths) == 1 else None


_read_padding = ReadOnce(_count_padding)


def _site_kind(path: str, module: nn.Module) -> str | None:
    """Joint attention alone; the refiner, which attends among text tokens before the blocks, stays stock."""
    return "joint" if path.startswith(("transformer_blocks.", "single_transformer_blocks.")) else None


def _modulated(root: Any, arguments: Mapping[str, Any], block: Any, block_arguments: Mapping[str, Any]) -> Tensor:
    """``[batch, video tokens, channels]``: the input of the first attention."""
    tokens, temb = block_arguments["hidden_states"], block_arguments["temb"]
    if "token_replace_emb" in block_arguments:  # blocks that modulate the first frame by itself
        normed = block.norm1(tokens, temb, block_arguments["token_replace_emb"], block_arguments["num_tokens"])
    else:
        normed = block.norm1(tokens, emb=temb)
    modulated: Tensor = normed[0]
    return modulated


_STREAMS = BlockStreams(("hidden_states", "encoder_hidden_states"))

HUNYUAN = register_family(
    Family(
        root_class="HunyuanVideoTransformer3DModel",
        layout=_layout,
        site_kind=_site_kind,
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        pipeline_roots=("transformer",),
        padding=_padding,
        block_streams={"transformer_blocks": _STREAMS, "single_transformer_blocks": _STREAMS},
        modulated={"default": _modulated},
        mlp_names=("ff", "ff_context"),  # of double blocks; single ones project attention and MLP together
    )
)
