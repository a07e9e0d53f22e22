"""Merging of similar tokens before attention, and its undoing: bipartite soft matching on a grid.

One token of each cell is a destination, all others are sources.  The sources most similar to some destination are
averaged into it.  Sources: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461; Bolya and
Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023, arXiv 2303.17604.

AgentSD (arXiv 2312.08874) takes both its shorter sequence and its agents from one matching of a block's input:

    pairs = match_tokens(x, grid, cell, generator=generator, share=2)
    short, agents = pairs.merge_ratio(0.4).merge(x), pairs.merge_ratio(0.95).merge(x)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..precision import in_full_precision

Grid = tuple[int, int, int]

# Upper bound for one temporary of similarities, in elements per batch item.
_SCORE_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class TokenMerge:
    """Which tokens become one.

    Attributes:
        slot: int64 `[B, N]`, the merged token that each token is part of.
        kept: int64 `[B, M]`, ascending: the token at whose place each merged token stands.
        counts: int64 `[B, M]`, how many tokens each merged token is the mean of.
    """

    slot: Tensor
    kept: Tensor
    counts: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """Averages what belongs together, in float32 (float64 for float64), in a fixed order on every device.

        Args:
            x: `[B, N, C]`, any strides.

        Returns:
            `[B, M, C]`, dtype of x; a token that stayed alone is bit-equal.

        Raises:
            ValueError: x is of another batch, token count or device.
        """
        self._check(x, self.slot.shape[1])
        if self.kept.shape == self.slot.shape:
            return x
        batch, merged = self.kept.shape
        ordered = _gather(x, self.slot.argsort(dim=1, stable=True))
        wide = ordered.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
        # Sums over runs rather than index_add, whose order of summation differs from run to run on a GPU.
        sums = torch.segment_reduce(wide, "sum", lengths=self.counts.flatten(), axis=0, unsafe=True)
        return (sums / self.counts.flatten()[:, None]).unflatten(0, (batch, merged)).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """Gives every token the value of the merged token it is part of.

        Args:
            y: `[B, M, C]`, any strides.

        Returns:
            `[B, N, C]`.

        Raises:
            ValueError: y is of another batch, token count or device.
        """
        self._check(y, self.kept.shape[1])
        return y if self.kept.shape == self.slot.shape else _gather(y, self.slot)

    def _check(self, x: Tensor, tokens: int) -> None:
        batch = self.slot.shape[0]
        if x.ndim != 3 or tuple(x.shape[:2]) != (batch, tokens) or x.device != self.slot.device:
            raise ValueError(
                f"The tensor has shape {tuple(x.shape)} on {x.device}; this merge takes [{batch}, {tokens}, channels] "
                f"on {self.slot.device}."
            )


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """Every source with its best destination, the most similar pair first.

    Attributes:
        tokens: N, sources and destinations together.
        sources: int64 `[B, S]`.
        targets: int64 `[B, S]`, the destination of each source.
        similarity: float `[B, S]`, cosine of the pair, descending.
    """

    tokens: int
    sources: Tensor
    targets: Tensor
    similarity: Tensor

    def merge_ratio(self, ratio: float) -> TokenMerge:
        """Merges the best `floor(tokens * ratio)` sources, or all sources if there are fewer.

        Raises:
            ValueError: The ratio is not within [0, 1].
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"A merge ratio is a share of all tokens, from 0 to 1; got {ratio}.")
        count = min(math.floor(self.tokens * ratio), self.sources.shape[1])
        sources, targets = self.sources[:, :count], self.targets[:, :count]
        batch, device = sources.shape[0], sources.device
        alone = torch.ones(batch, self.tokens, dtype=torch.bool, device=device).scatter_(1, sources, False)
        slot = alone.cumsum(1) - 1
        slot.scatter_(1, sources, slot.gather(1, targets))
        # A stable sort brings the kept tokens to the front in their order, without asking the device how many.
        kept = alone.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, : self.tokens - count]
        counts = torch.zeros_like(kept).scatter_add_(1, slot, torch.ones_like(slot))
        return TokenMerge(slot, kept, counts)


def match_tokens(
    metric: Tensor,
    grid: Grid,
    cell: Grid,
    *,
    generator: torch.Generator | None = None,
    share: int = 1,
) -> TokenPairs:
    """Chooses a destination in each cell, and for each other token the destination it is most similar to.

    Batch items do not influence each other.  Similarities are cosines in float32 (float64 for float64), held for a
    part of the sources at a time.

    Args:
        metric: `[B, N, C]`, what similarity is measured on, such as the input of a block; tokens in raster order.
        grid: Tokens along (frames, height, width); one frame for images.
        cell: Tokens of a cell along the same axes.  Cells that do not divide the grid are smaller at its far borders.
        generator: Draws the destination in each cell, best on the device of `metric`; None takes each cell's first.
        share: The batch consists of so many equal parts with the same destinations: 2 where the halves are the
            conditional and the unconditional branch.

    Returns:
        The pairs, on the device of `metric`.  No gradient flows through the choice.

    Raises:
        ValueError: Tokens do not fill the grid, a side below 1, or a batch that does not split into `share` parts.
    """
    _check(metric, grid, cell, share)
    draws = 1 if generator is None else metric.shape[0] // share
    return pair_tokens(metric, draw_destinations(grid, cell, generator, draws).to(metric.device))


def pair_tokens(metric: Tensor, destinations: Tensor) -> TokenPairs:
    """For each token that is no destination the destination it is most similar to, as in `match_tokens`.

    Traceable: while it is being compiled, the choice is one operator, so that it is the very choice of eager code.

    Args:
        metric: `[B, N, C]`, what similarity is measured on.
        destinations: int64 `[draws, cells]`, from `draw_destinations`, on the device of `metric`; the batch is a
            multiple of `draws` and repeats them in turn.

    Raises:
        ValueError: The batch is no multiple of the draws, or they are on another device.
    """
    batch, draws = metric.shape[0], destinations.shape[0]
    if batch % draws or metric.device != destinations.device:
        raise ValueError(
            f"destinations are {draws} draws on {destinations.device}; a batch of {batch} on {metric.device} takes "
            "draws that divide it, on its device."
        )
    find: Any = best_pairs if torch.compiler.is_compiling() else _best_pairs
    return TokenPairs(metric.shape[1], *find(metric.detach(), destinations.repeat(batch // draws, 1)))


def draw_destinations(grid: Grid, cell: Grid, generator: torch.Generator | None, draws: int = 1) -> Tensor:
    """One token of each cell.

    Args:
        grid: As in `match_tokens`.
        cell: As in `match_tokens`.
        generator: Draws it; None takes each cell's first.
        draws: How many independent choices.

    Returns:
        int64 `[draws, cells]` on the device of the generator, on the CPU if there is none.

    Raises:
        ValueError: A side below 1.
    """
    _check_sides(grid, cell)
    where = torch.device("cpu") if generator is None else generator.device
    corners = torch.meshgrid(
        *(torch.arange(0, n, c, device=where) for n, c in zip(grid, cell, strict=True)), indexing="ij"
    )
    chosen = torch.zeros(draws, corners[0].numel(), dtype=torch.int64, device=where)
    for axis, corner in enumerate(map(torch.flatten, corners)):
        offset = torch.zeros_like(chosen)
        if generator is not None:
            room = (grid[axis] - corner).clamp(max=cell[axis])
            drawn = torch.rand(chosen.shape, generator=generator, dtype=torch.float32, device=where)
            # The product may round up to the whole side.
            offset = torch.minimum((drawn * room).long(), room - 1)
        chosen = chosen * grid[axis] + corner + offset
    return chosen


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of each item, `[B, len, C]`, by whole rows: on CPUs several times faster than `torch.gather`."""
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
    rows = x.flatten(0, 1).index_select(0, (index + first[:, None]).flatten())
    return rows.unflatten(0, index.shape)


@in_full_precision
def _best_pairs(metric: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, their targets and similarities, the most similar pair first, all `[B, S]`."""
    batch, tokens = metric.shape[:2]
    is_source = torch.ones(batch, tokens, dtype=torch.bool, device=metric.device).scatter_(1, destinations, False)
    sources = is_source.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, : tokens - destinations.shape[1]]
    similarity, best = _best_destination(metric, sources, destinations)
    similarity, rank = similarity.sort(dim=1, descending=True, stable=True)
    return sources.gather(1, rank), destinations.gather(1, best.gather(1, rank)), similarity


@torch.library.custom_op("dit_accel::best_pairs", mutates_args=())
def best_pairs(metric: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_tokens` as one torch operator, for compiled code.

    Args:
        metric: As there.
        destinations: int64 `[B, cells]`.

    Returns:
        Sources, targets and similarities of the pairs.
    """
    return _best_pairs(metric, destinations)


@best_pairs.register_fake
def _(metric: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (metric.shape[0], metric.shape[1] - destinations.shape[1])
    index = destinations.new_empty(shape)
    wide = torch.promote_types(metric.dtype, torch.float32)
    return index, torch.empty_like(index), metric.new_empty(shape, dtype=wide)


def _best_destination(metric: Tensor, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity and place in `destinations` of the best one for each source, both `[B, S]`."""
    unit = torch.nn.functional.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    to = _gather(unit, destinations).transpose(1, 2)
    step = max(1, _SCORE_CHUNK // destinations.shape[1])
    parts = [(_gather(unit, part) @ to).max(-1) for part in sources.split(step, 1)]
    return torch.cat([part.values for part in parts], 1), torch.cat([part.indices for part in parts], 1)


def _check_sides(grid: Grid, cell: Grid) -> None:
    for name, sides in (("grid", grid), ("cell", cell)):
        if len(sides) != 3 or min(sides) < 1:
            raise ValueError(f"A {name} is (frames, height, width), each at least 1; got {sides}.")


def _check(metric: Tensor, grid: Grid, cell: Grid, share: int) -> None:
    _check_sides(grid, cell)
    if metric.ndim != 3 or not metric.is_floating_point() or metric.shape[1] != grid[0] * grid[1] * grid[2]:
        raise ValueError(
            f"metric is {metric.dtype} of shape {tuple(metric.shape)}; a grid of {grid} needs floating point "
            f"[batch, {grid[0] * grid[1] * grid[2]}, channels]. Leave text tokens out."
        )
    if share < 1 or metric.shape[0] % share:
        raise ValueError(f"share={share} does not split a batch of {metric.shape[0]} into equal parts.")
