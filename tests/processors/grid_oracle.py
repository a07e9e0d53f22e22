"""Bands and lines of blocks from their formulas, in loops over single pairs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.layout import TokenLayout

GOLDEN = 2654435769


@st.composite
def layouts(draw: st.DrawFn, frames: int = 2) -> TokenLayout:
    """Odd grids; text before, after or absent; a reference image; tokens permuted or not."""
    grid = (draw(st.integers(frames, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    tokens = math.prod(grid)
    text, where = draw(st.integers(1, 7)), draw(st.sampled_from(["before", "after", "absent", "with a reference"]))
    if where == "before":
        layout = TokenLayout(grid, (text, text + tokens), text=(0, text))
    elif where == "after":
        layout = TokenLayout(grid, (0, tokens), text=(tokens, tokens + text))
    elif where == "absent":
        layout = TokenLayout.video_only(grid)
    else:
        layout = TokenLayout(grid, (2, 2 + tokens), text=(0, 2), references=((2 + tokens, 2 + tokens + text),))
    if not draw(st.booleans()):
        return layout
    order = torch.arange(layout.length)
    start, stop = layout.visual
    order[start:stop] = torch.tensor(draw(st.permutations(range(start, stop))))
    return TokenLayout(layout.grid, layout.visual, layout.text, layout.references, order=order)


def places(layout: TokenLayout) -> list[Any]:
    """Frame, row and column of every token of the sequence as it is stored, None for others than video."""
    frames, height, width = layout.grid
    tokens: list[Any] = [None] * layout.length
    for t, y, x in itertools.product(range(frames), range(height), range(width)):
        tokens[layout.visual[0] + (t * height + y) * width + x] = (t, y, x)
    return tokens if layout.order is None else [tokens[token] for token in layout.order.tolist()]


def others_in_order(layout: TokenLayout, tokens: list[Any]) -> list[int]:
    """Places of tokens that are no video, as they come before any permutation."""
    raster = range(layout.length) if layout.order is None else torch.argsort(layout.order).tolist()
    return [place for place in raster if tokens[place] is None]


def kept_pairs(order: list[int], block: int, density: float, always: set[tuple[int, int]]) -> tuple[Tensor, float]:
    """By definition: blocks of `order`, nearest to the diagonal first, until the density is nearest to its goal.

    Args:
        order: Places in the sequence.
        block: Tokens per block.
        density: The goal.
        always: Pairs of blocks that are kept in any case.

    Returns:
        The pairs of places that are kept, and the density.
    """
    length = len(order)
    cut = [order[i : i + block] for i in range(0, length, block)]
    pairs = list(itertools.product(range(len(cut)), range(len(cut))))
    always = always | {(i, i) for i in range(len(cut))}
    ranked = sorted(
        (pair for pair in pairs if pair not in always),
        key=lambda pair: (abs(pair[0] - pair[1]), min(pair) * GOLDEN % 2**32, pair[0] > pair[1]),
    )
    kept, best = set(always), set(always)

    def pairs_of(blocks: set[tuple[int, int]]) -> int:
        return sum(len(cut[i]) * len(cut[j]) for i, j in blocks)

    for pair in ranked:
        kept = kept | {pair}
        if abs(pairs_of(kept) - density * length**2) < abs(pairs_of(best) - density * length**2):
            best = kept
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i, j in best:
        for a, b in itertools.product(cut[i], cut[j]):
            mask[a, b] = True
    return mask, pairs_of(best) / length**2


def blocks_with(order: list[int], block: int, tokens: list[Any], holds: Any) -> set[int]:
    return {i // block for i, place in enumerate(order) if holds(tokens[place])}


def with_others(count: int, others: set[int]) -> set[tuple[int, int]]:
    return {(i, j) for i, j in itertools.product(range(count), range(count)) if i in others or j in others}


def tensors(batch: int, heads: int, length: int, seed: int = 0, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, length, dim, generator=generator) for _ in range(3))
    return 1.5 * q, 1.5 * k, v


def best_of(weights: Tensor, video: list[int], strides: tuple[int, ...]) -> tuple[int, int]:
    """By definition: which stride, and which phase, of one head; weights `[rows, N]` of the queries that are asked."""
    mass = [float(weights[:, place].mean()) for place in video]
    best, found = -math.inf, (0, 0)
    for c, stride in enumerate(strides):
        for phase in range(stride):
            line = range(phase, len(video), stride)
            excess = sum(mass[i] for i in line) - sum(mass) * len(line) / len(video)
            if excess > best:
                best, found = excess, (c, phase)
    return found
