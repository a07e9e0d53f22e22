"""The masks that heads choose among: bands in space and in time (Sparse VideoGen), lines at equal distances (grid).

Sources: Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity", ICML
2025, arXiv 2502.01776; Li et al., "MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware
Permutation Sparse Attention", ICML 2025, arXiv 2504.16083.

In all orders here the video tokens come first, and after them the others (text, reference images) as they come.  A
block that holds any of these others sees everything and is seen by all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.kernels.grid.lines import by_phase
from dit_accel.kernels.grid.masks import Listed, Masks, listed, stacked
from dit_accel.kernels.pair_tests import block_area
from dit_accel.kernels.token_order import inverse_order, pixel_order, raster_order

if TYPE_CHECKING:
    from dit_accel.layout import TokenLayout

_GOLDEN = 2654435769  # 2**32 over the golden ratio: its multiples, modulo 2**32, fill any range evenly


def spatial_temporal_masks(
    layout: TokenLayout,
    *,
    densities: Sequence[float],
    block: int,
    first_frame: bool,
    device: torch.device | str = "cpu",
) -> tuple[Masks, list[Listed]]:
    """Two masks for each density: a band of blocks frame after frame, then one pixel after pixel; see `band`.

    Args:
        layout: Where the tokens are.
        densities: Kept pairs over all pairs of the sequence, which masks come as near to as whole blocks allow.
        block: Tokens per block.
        first_frame: Whether the first mask also keeps the blocks of keys that touch the first frame.
        device: Where the lists live.

    Returns:
        The masks together, and each of them on the CPU; density by density.
    """
    sink = -(-layout.frame_tokens // block) if first_frame else 0
    shape = (layout.length, layout.visual[1] - layout.visual[0], block)
    masks = [band(*shape, density, columns) for density in densities for columns in (sink, 0)]
    orders = [raster_order(layout.grid, "cpu"), pixel_order(layout.grid, "cpu")]
    return _in_orders(layout, masks, orders, block, device), masks


def stride_masks(
    layout: TokenLayout,
    strides: Sequence[int],
    *,
    densities: Sequence[float],
    block: int,
    device: torch.device | str = "cpu",
) -> tuple[Masks, list[Listed]]:
    """For each stride its lines one after the other: the first sees all and is seen by all, and a band; see `band`.

    A head whose line is another one turns the order until that line is the first; lines of one stride differ in length
    by one token at most, and as many blocks are kept as the longest one touches.

    Args:
        layout: Where the tokens are.
        strides: Tokens from one key of a line to the next, each from 1 to the tokens of the video.
        densities: As above.
        block: Tokens per block.
        device: Where the lists live.

    Returns:
        The masks together, and each of them on the CPU; for each density one for each stride.
    """
    tokens = layout.visual[1] - layout.visual[0]
    lines = [math.ceil(math.ceil(tokens / stride) / block) for stride in strides]
    masks = [band(layout.length, tokens, block, density, line, line) for density in densities for line in lines]
    return _in_orders(layout, masks, [by_phase(tokens, stride) for stride in strides], block, device), masks


def line_strides(grid: tuple[int, int, int], multiples: Sequence[int]) -> tuple[int, ...]:
    """Multiples of the lengths of a row and of a frame that leave at least two tokens to every line, ascending.

    Args:
        grid: Tokens along (frames, height, width).
        multiples: Factors on both lengths.

    Returns:
        The strides, without repetition; from 2 to half of the tokens.

    Raises:
        ValueError: If there are none.
    """
    frames, height, width = grid
    wanted = {factor * length for factor in multiples for length in (width, height * width)}
    strides = tuple(stride for stride in sorted(wanted) if 2 <= stride <= frames * height * width // 2)
    if not strides:
        raise ValueError(
            f"no stride fits a grid of {grid} tokens: multiples {tuple(multiples)} of its row and frame, {width} and "
            f"{height * width}, give {tuple(sorted(wanted))}, and a stride is from 2 to half of the tokens; give "
            "other multiples, or use another method"
        )
    return strides


@functools.lru_cache(maxsize=16)  # the sites of a model ask for the same few
def band(length: int, video: int, block: int, density: float, columns: int = 0, rows: int = 0) -> Listed:
    """Blocks near the diagonal, as many as a density allows, and some that are always kept.

    The published band is `length * (1 - sqrt(1 - density))` tokens wide to each side, whatever is kept besides.  Here
    blocks are added diagonal by diagonal, the rows of a diagonal spread by the golden ratio, until the density is as
    near to its goal as whole blocks allow, the lower of two that are equally near; so the outermost diagonals may have
    gaps.  The main one is always kept.

    Args:
        length: Tokens of the sequence.
        video: How many of them are video, the first ones; blocks that hold any other see all and are seen by all.
        block: Tokens per block.
        density: Kept pairs over all pairs of the sequence; everything is counted, short last blocks exactly.
        columns: Blocks of keys at the beginning that everyone sees.
        rows: Blocks of queries at the beginning that see everything.

    Returns:
        The mask; the same object for the same arguments, so it must not be written to.
    """
    places = torch.arange(-(-length // block), device="cpu")
    distance, first = (places[:, None] - places).abs(), torch.minimum(places[:, None], places)
    others = ((places + 1) * block > video) & (video < length)
    always = (distance == 0) | others[:, None] | others | (places < columns) | (places < rows)[:, None]
    key = (distance << 33) + (first * _GOLDEN % (1 << 32) << 1) + (places[:, None] > places)
    ranked = key.masked_fill(always, -1).flatten().argsort(stable=True)
    area = block_area(length, length, block, block, torch.device("cpu")).flatten()
    missed = (area[ranked].cumsum(0).double() - density * length**2).abs()
    least = int(always.sum())
    count = least + int(missed[least - 1 :].argmin())
    blocks = torch.zeros_like(always).flatten().index_fill(0, ranked[:count], True).view_as(always)
    return listed(blocks, length, block)


def in_sequence(layout: TokenLayout) -> Tensor:
    """Where tokens stand in the sequence: those of the video in raster order, then all others as they come.

    Args:
        layout: Where they are; its token permutation is taken into account.

    Returns:
        int64 `[length]` on the CPU.
    """
    start, stop = layout.visual
    tokens = torch.arange(layout.length, device="cpu")
    places = torch.cat((tokens[start:stop], tokens[:start], tokens[stop:]))
    return places if layout.order is None else inverse_order(layout.order.cpu())[places]


def _in_orders(
    layout: TokenLayout, masks: list[Listed], orders: Sequence[Tensor], block: int, device: torch.device | str
) -> Masks:
    """Masks in orders of video tokens, which they take in turns, and behind these all other tokens."""
    video, places = orders[0].numel(), in_sequence(layout)
    in_order = [torch.cat((places[:video][order], places[video:])) for order in orders] * (len(masks) // len(orders))
    return stacked(masks, torch.stack(in_order).to(device), block=block, video=video)
