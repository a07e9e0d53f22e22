"""Flux.1: images; text and image tokens attend jointly, the text first, in double blocks and in single ones.

Images that are given to the model (Kontext) follow the image that is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..layout import TokenLayout
from .reading import ReadOnce
from .registry import Family, register_family
from .streams import BlockStreams

_Grid = tuple[int, int, tuple[int, ...]]  # height and width of the image, tokens of each reference image


def _layout(root: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    text, ids = arguments["encoder_hidden_states"].shape[1], arguments["img_ids"]
    height, width, references = _grid(ids)
    stop = text + height * width
    if stop - text + sum(references) != arguments["hidden_states"].shape[1]:
        raise ValueError(
            f"img_ids of shape {tuple(ids.shape)} do not fit hidden_states with "
            f"{arguments['hidden_states'].shape[1]} tokens; give one row of ids for each token"
        )
    edges = list(itertools.accumulate(references, initial=stop))
    return TokenLayout(
        (1, height, width), (text, stop), text=(0, text) if text else None, references=tuple(itertools.pairwise(edges))
    )


def _read_grid(ids: torch.Tensor) -> _Grid:
    """Ids are (image, row, column). In bfloat16 large ones are rounded, so rows are told apart, not numbered."""
    table = (ids[0] if ids.ndim == 3 else ids).detach().float().cpu()
    images, counts = torch.unique_consecutive(table[:, 0], return_counts=True)
    rows, columns = table[: counts[0], 1], table[: counts[0], 2]
    width = int(torch.unique_consecutive(rows, return_counts=True)[1][0])
    height = len(rows) // width
    raster = (height, width)
    if len(rows) != height * width or not (
        torch.equal(columns, columns[:width].repeat(height))
        and torch.equal(rows, rows[::width].repeat_interleave(width))
    ):
        raise ValueError(
            "img_ids do not number the tokens of an image row by row, so dit_accel cannot tell its grid; pass them as "
            f"FluxPipeline makes them (the first of {len(images)} images has {len(rows)} tokens, {raster} was tried)"
        )
    return height, width, tuple(counts[1:].tolist())


_grid = ReadOnce(lambda ids: _read_grid(ids))


def _site_kind(path: str, module: nn.Module) -> str | None:
    return "joint" if path.startswith(("transformer_blocks.", "single_transformer_blocks.")) else None


def _modulated(
    root: Any, arguments: Mapping[str, Any], block: Any, block_arguments: Mapping[str, Any]
) -> torch.Tensor:
    """``[batch, image tokens, channels]``: the input of the first attention."""
    output: torch.Tensor = block.norm1(block_arguments["hidden_states"], emb=block_arguments["temb"])[0]
    return output


_STREAMS = BlockStreams(("encoder_hidden_states", "hidden_states"))

FLUX = register_family(
    Family(
        root_class="FluxTransformer2DModel",
        layout=_layout,
        site_kind=_site_kind,
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        pipeline_roots=("transformer",),
        makes_video=False,
        text_first=True,
        block_streams={"transformer_blocks": _STREAMS, "single_transformer_blocks": _STREAMS},
        modulated={"default": _modulated},
        mlp_names=("ff", "ff_context"),  # of double blocks; single ones project attention and MLP together
    )
)
