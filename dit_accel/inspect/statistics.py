"""Figures of one attention call: how concentrated it is, how it falls off with distance, and where it looks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..controls import attention_rows, sum_blocks
from ..layout import TokenLayout
from .blocks import FEWEST_BLOCKS, density_for, recall_at

SHARES = (0.1, 0.2)  # of the key blocks, for the recall
LEVEL = 0.95  # of the mass, for the density
CHUNK = 1 << 26  # weights that are held at once, in float32


def call_statistics(query: Tensor, key: Tensor, layout: TokenLayout, block: int = 64) -> dict[str, Tensor]:
    """Measures the exact softmax attention among the visual tokens of one call, block of queries by block of queries.

    Attention to text is left out and the rest of each row scaled to 1, as sparse methods keep text anyhow.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key: ``[batch, heads, tokens, head_dim]``.
        layout: where the tokens are; other than visual ones may follow or precede these.
        block: tokens per block of queries and of keys.

    Returns:
        means over batch and queries, float32 ``[heads]`` unless said:

        - ``recall_10``, ``recall_20``: mass in the heaviest tenth, fifth of the key blocks of each query block, with a
          fraction of a block where that is no whole number; 0.1 and 0.2 if attention is uniform.
        - ``density_95``: the least share of the key blocks that holds 95 % of the mass.
        - ``space``: ``[heads, distances]``, mean weight of tokens of the query's own frame at each distance (in
          tokens, rounded), relative to uniform attention over all visual tokens.
        - ``frames``: ``[heads, frames]``, the same by distance in frames.
        - ``first_frame``: mass of the first frame, for queries outside it.
        - ``same_frame``: mass of the query's own frame.
        - ``same_position``: mass of the query's own place in all other frames.
        - ``text``: mass of all tokens that are not visual.

        The first three are absent below 10 blocks, ``text`` if all tokens are visual; images have ``space`` but none
        of the figures about frames.

    Raises:
        ValueError: if there are not as many tokens as the layout says, or they are permuted.
    """
    parts = []
    for figures, mass in measured(query, key, layout, block):
        if mass.shape[-1] >= FEWEST_BLOCKS:
            recall = recall_at(mass, SHARES)
            figures |= {f"recall_{round(share * 100)}": recall[:, at] for at, share in enumerate(SHARES)}
            figures[f"density_{round(LEVEL * 100)}"] = density_for(mass, LEVEL)
        parts.append(figures)
    return join_heads(parts)


def measured(
    query: Tensor, key: Tensor, layout: TokenLayout, block: int = 64
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Measures some heads of a call after the others, so that no more than about 256 MiB of weights are held at once.

    Args:
        query: as in :func:`call_statistics`, likewise the others.
        key: as there.
        layout: as there.
        block: as there.

    Yields:
        Of consecutive heads: all figures of :func:`call_statistics` but the first three, and ``[batch, heads, query
        blocks, key blocks]``, the mass that blocks of visual queries pay to blocks of visual keys; rows sum to 1.

    Raises:
        ValueError: as there.
    """
    check_fit(query, key, layout)
    start, stop = layout.visual
    width = max(1, CHUNK // (query.shape[0] * block * key.shape[2]))
    for some_query, some_key in zip(query.split(width, 1), key.split(width, 1), strict=True):
        tally = _Tally(some_query.shape[1], layout, query.device)
        rows = attention_rows(some_query[:, :, start:stop], some_key, block)
        mass = [tally.add(number * block, part, block) for number, part in enumerate(rows)]
        yield tally.means(), torch.stack(mass, 2)


def check_fit(query: Tensor, key: Tensor, layout: TokenLayout) -> None:
    """Refuses calls whose tokens are not those of the layout, one by one.

    Raises:
        ValueError: as :func:`call_statistics`.
    """
    if not query.shape[2] == key.shape[2] == layout.length:
        raise ValueError(
            f"the layout says {layout.length} tokens, the call has {query.shape[2]} queries and {key.shape[2]} keys; "
            "only self-attention and joint attention can be measured"
        )
    if layout.order is not None:
        raise ValueError("distances are those of tokens in raster order; measure without a token permutation")


def join_heads(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Puts the figures of consecutive heads together, along the first axis."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _Place(NamedTuple):
    """Frame, row and column of some visual tokens."""

    frame: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, positions: Tensor, grid: tuple[int, int, int]) -> _Place:
        _, height, width = grid
        return cls(positions // (height * width), positions // width % height, positions % width)


class _Tally:
    """Sums over the queries seen so far, for each head."""

    def __init__(self, heads: int, layout: TokenLayout, device: torch.device) -> None:
        frames, height, width = layout.grid
        self.layout, self.device = layout, device
        self.keys = _Place.of(torch.arange(height * width, device=device), layout.grid)  # of one frame
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        distances = round(math.hypot(height - 1, width - 1)) + 1
        self.space = torch.zeros(distances, heads + 1, device=device)  # last column: how many pairs there are
        self.frames = torch.zeros(frames, heads + 1, device=device)

    def add(self, first: int, rows: Tensor, block: int) -> Tensor:
        """Counts ``[batch, heads, queries, keys]`` rows, whose first is the visual token ``first``.

        Returns:
            ``[batch, heads, key blocks]``, what the rows pay to each block of visual keys on average.
        """
        start, stop = self.layout.visual
        weights = rows[..., start:stop]
        shares = weights.sum(-1, keepdim=True)
        weights = weights / shares
        place = _Place.of(torch.arange(first, first + rows.shape[2], device=self.device), self.layout.grid)
        if self.layout.length > stop - start:
            self._add("text", 1 - shares[..., 0])
        by_frame = weights.unflatten(-1, (self.layout.grid[0], -1))
        self._add_space(by_frame, place)
        if self.layout.grid[0] > 1:
            self._add_frames(by_frame, place)
        return sum_blocks(weights.mean(2), block)

    def means(self) -> dict[str, Tensor]:
        """Of everything counted."""
        found = {name: total / self.counts[name] for name, total in self.sums.items()}
        tokens = self.layout.visual[1] - self.layout.visual[0]
        for name, profile in (("space", self.space), ("frames", self.frames)):
            if len(profile) > 1:
                found[name] = (profile[:, :-1] / profile[:, -1:]).T * tokens
        return found

    def _add(self, name: str, values: Tensor) -> None:
        """``[batch, heads, queries]``."""
        self.sums[name] = self.sums.get(name, 0) + values.sum((0, 2))
        self.counts[name] = self.counts.get(name, 0) + values.shape[0] * values.shape[2]

    def _add_space(self, by_frame: Tensor, place: _Place) -> None:
        """``by_frame``: ``[batch, heads, queries, frames, tokens of a frame]``."""
        rows, columns = (ours[:, None] - keys for ours, keys in zip(place[1:], self.keys[1:], strict=True))
        distance = torch.hypot(rows.float(), columns.float()).round().long().flatten()
        queries = torch.arange(len(place.frame), device=self.device)
        own = by_frame[:, :, queries, place.frame]
        _add_profile(self.space, distance, own)

    def _add_frames(self, by_frame: Tensor, place: _Place) -> None:
        frames, frame_tokens = by_frame.shape[-2:]
        mass = by_frame.sum(-1)
        key_frame = torch.arange(frames, device=self.device)
        distance = (place.frame[:, None] - key_frame).abs()
        _add_profile(self.frames, distance.flatten(), mass, frame_tokens)
        is_own = (distance == 0).float()
        position = (place.row * self.layout.grid[2] + place.column)[:, None, None].expand(-1, frames, 1)
        there = by_frame.gather(-1, position.expand(*by_frame.shape[:2], -1, -1, -1))[..., 0]
        self._add("same_frame", (mass * is_own).sum(-1))
        self._add("same_position", (there * (1 - is_own)).sum(-1))
        self._add("first_frame", mass[:, :, place.frame > 0, 0])


def _add_profile(profile: Tensor, distance: Tensor, weights: Tensor, keys: int = 1) -> None:
    """Adds ``[batch, heads, queries, keys]`` weights, each of ``keys`` tokens, to the rows of their distances."""
    batch, heads = weights.shape[:2]
    by_pair = weights.sum(0).reshape(heads, -1).T.contiguous()  # adding along the first axis is much faster
    pairs = by_pair.new_full((len(by_pair), 1), batch * keys)
    profile.index_add_(0, distance, torch.cat([by_pair, pairs], 1))
