"""Element tests of PARTIAL blocks: which (query, key) pairs stay when a block is kept in part.

A closed set: `Band`, `Neighborhood` and `Bitmap`.  Every test answers `keeps` for positions of the plan, which is its
definition, counts the pairs it keeps in each block, and packs into one form for the operator and its kernels
(`encode`).  The length of the last block is no test of its own: every backend cuts there anyway.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .bitmap import Bitmap

# Upper bound for one temporary while pairs are counted, in elements.
_COUNT_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Band:
    """Element test of a video band mask (Radial Attention, arXiv 2506.19852).

    Query `q` in frame i at raster position k keeps key `kv` in frame j at raster position l iff
    `|k - l| <= widths[|i - j|]`.  Text and sink tokens are always kept.

    Attributes:
        frame_tokens: Tokens per frame.
        widths: int32 `[frames]`, half-width for each frame distance; -1 keeps nothing at that distance.
        video_len: Tokens `[0, video_len)` are video, frame after frame.  Everything behind is text, which sees and is
            seen by every token.
        sink_tokens: Keys `[0, sink_tokens)` are kept by every query.
    """

    frame_tokens: int
    widths: Tensor
    video_len: int
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.frame_tokens < 1:
            raise ValueError(f"Band.frame_tokens must be at least 1, got {self.frame_tokens}.")
        if self.widths.ndim != 1 or self.widths.dtype != torch.int32 or self.widths.numel() == 0:
            raise ValueError(
                f"Band.widths must be a non-empty int32 vector with one half-width per frame distance, "
                f"got {self.widths.dtype} of shape {tuple(self.widths.shape)}."
            )
        room = self.frame_tokens * self.widths.numel()
        if not 0 <= self.video_len <= room:
            raise ValueError(
                f"Band.video_len is {self.video_len}, but {self.widths.numel()} frames of {self.frame_tokens} tokens "
                f"hold {room}. Give one width per frame."
            )
        if self.sink_tokens < 0:
            raise ValueError(f"Band.sink_tokens must not be negative, got {self.sink_tokens}.")

    def keeps(self, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """Tells which (query, key) pairs the band keeps; this method is the definition.

        Args:
            q_index: Integer query positions.
            kv_index: Integer key positions, broadcastable against `q_index`.

        Returns:
            Bool tensor of the broadcast shape.
        """
        last = self.widths.numel() - 1
        frames = (q_index // self.frame_tokens - kv_index // self.frame_tokens).abs().clamp(max=last)
        offset = (q_index % self.frame_tokens - kv_index % self.frame_tokens).abs()
        near = offset <= self.widths.to(frames.device)[frames.long()]
        return near | (q_index >= self.video_len) | (kv_index >= self.video_len) | (kv_index < self.sink_tokens)

    def keeps_in(self, batch: Tensor | int, head: Tensor | int, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """`keeps` for one batch item and head; a band is the same for all."""
        return self.keeps(q_index, kv_index)

    def pairs_per_block(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Tensor:
        """Counts the pairs the band keeps in every block, exactly and without an element mask.

        Keys are cut where the block, the frame, the sink or the text begins.  Inside such a segment the kept keys of
        one query are an interval, so counting is arithmetic: `q_len` times the number of segments.

        Returns:
            int64 `[ceil(q_len / block_q), ceil(kv_len / block_kv)]` on the device of `widths`.
        """
        device = self.widths.device
        starts, ends = self._segments(kv_len, block_kv, device)
        free = (starts >= self.video_len) | (starts < self.sink_tokens)
        frame = (starts // self.frame_tokens).clamp(max=self.widths.numel() - 1)
        low = starts - frame * self.frame_tokens
        high = low + (ends - starts)
        rows, cols = -(-q_len // block_q), -(-kv_len // block_kv)
        out = torch.zeros(rows, cols, dtype=torch.int64, device=device)
        step = max(1, _COUNT_CHUNK // (starts.numel() * block_q)) * block_q
        for begin in range(0, q_len, step):
            q = torch.arange(begin, min(begin + step, q_len), device=device)[:, None]
            k = q % self.frame_tokens
            distance = (q // self.frame_tokens - frame).abs().clamp(max=self.widths.numel() - 1)
            width = self.widths[distance].long()
            kept = (torch.minimum(high, k + width + 1) - torch.maximum(low, k - width)).clamp(min=0)
            kept = torch.where(free | (q >= self.video_len), ends - starts, kept)
            per_q = torch.zeros(q.numel(), cols, dtype=torch.int64, device=device)
            per_q.index_add_(1, starts // block_kv, kept)
            out.index_add_(0, q[:, 0] // block_q, per_q)
        return out

    def _segments(self, kv_len: int, block_kv: int, device: torch.device) -> tuple[Tensor, Tensor]:
        cuts = [
            torch.arange(0, kv_len, block_kv, device=device),
            torch.arange(0, min(self.video_len, kv_len), self.frame_tokens, device=device),
            torch.tensor([min(self.sink_tokens, kv_len), min(self.video_len, kv_len), kv_len], device=device),
        ]
        edges = torch.cat(cuts).unique()
        return edges[:-1], edges[1:]

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it holds."""
        return (self.widths,)

    def to(self, device: torch.device | str) -> Band:
        """Copies the band to `device`."""
        return replace(self, widths=self.widths.to(device))

    def check_fit(self, q_len: int, kv_len: int, block_q: int, block_kv: int, lead: tuple[int, int]) -> None:
        """Raises ValueError if a plan of these sizes cannot carry the test; a band fits any plan."""


@dataclass(frozen=True, eq=False)
class Neighborhood:
    """Generalized neighborhood attention (arXiv 2504.16922) over a grid of 1 to 3 dimensions; build it with `of`.

    Per dimension, a query at coordinate i keeps the keys `first(i), first(i) + dilation, ..., last(i)`; a pair is kept
    if all dimensions keep it.  Text tokens behind the grid see and are seen by every token.

    Attributes:
        grid: Tokens per dimension, always three; missing leading dimensions are 1.
        dilation: Key distance per dimension.
        ranges: int32 `[sum(grid), 2]`: first and last kept coordinate for each query coordinate, dimension after
            dimension.
        raster: int32 `[positions]` or None.  Plan position p holds the token of raster index `raster[p]`, where
            `prod(grid)` and above are text; the same for queries and keys.  None: positions are raster indices.
    """

    grid: tuple[int, int, int]
    dilation: tuple[int, int, int]
    ranges: Tensor
    raster: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or len(self.dilation) != 3 or min(*self.grid, *self.dilation) < 1:
            raise ValueError(
                f"Neighborhood.grid and dilation are three numbers of at least 1 each, got {self.grid} and "
                f"{self.dilation}. Neighborhood.of() takes grids of 1 to 3 dimensions."
            )
        if self.ranges.dtype != torch.int32 or tuple(self.ranges.shape) != (sum(self.grid), 2):
            raise ValueError(
                f"Neighborhood.ranges must be int32 of shape {(sum(self.grid), 2)}, got {self.ranges.dtype} of "
                f"{tuple(self.ranges.shape)}. Neighborhood.of() computes it."
            )
        if self.raster is not None and (self.raster.ndim != 1 or self.raster.dtype != torch.int32):
            raise ValueError(
                f"Neighborhood.raster must be an int32 vector, got {self.raster.dtype} of shape "
                f"{tuple(self.raster.shape)}. Convert it with .to(torch.int32)."
            )

    @classmethod
    def of(
        cls,
        grid: Sequence[int],
        window: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        raster: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Neighborhood:
        """Builds the test from NATTEN's parameters; each is one value, or one per dimension.

        A window that would reach over the border is moved inward, so without `causal` every query keeps exactly
        `prod(window)` keys of the grid.

        Args:
            grid: Tokens per dimension, 1 to 3 dimensions, slowest first.
            window: Keys per dimension.  An even window reaches one further to the left.
            stride: Queries that share a window; 1 slides, `window` gives blocks.
            dilation: Distance between the keys of a window.
            causal: Whether a query sees keys up to its own coordinate only.
            raster: See `Neighborhood.raster`; int64 is converted.
            device: Where the tables go; that of `raster` if given.

        Returns:
            The test.

        Raises:
            ValueError: A parameter is out of range: `window * dilation <= grid` and `1 <= stride <= window`.
        """
        dims = len(grid)
        if not 1 <= dims <= 3 or min(grid) < 1:
            raise ValueError(f"grid must be 1 to 3 numbers of at least 1, got {tuple(grid)}.")
        windows, strides, dilations = (
            _per_dim(name, value, dims)
            for name, value in (("window", window), ("stride", stride), ("dilation", dilation))
        )
        causals = _per_dim("causal", causal, dims)
        ranges: list[tuple[int, int]] = [(0, 0)] * (3 - dims)
        for i, length in enumerate(grid):
            ranges += _ranges(length, windows[i], strides[i], dilations[i], bool(causals[i]))
        pad = (1,) * (3 - dims)
        table = torch.tensor(ranges, dtype=torch.int32, device=device if raster is None else raster.device)
        raster = None if raster is None else raster.to(torch.int32)
        sizes, steps = (*pad, *map(int, grid)), (*pad, *dilations)
        return cls((sizes[0], sizes[1], sizes[2]), (steps[0], steps[1], steps[2]), table, raster)

    @property
    def video_len(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    def keeps(self, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """Tells which (query, key) pairs are kept; arguments and result as `Band.keeps`."""
        q, kv = self._raster_index(q_index), self._raster_index(kv_index)
        kept = (q >= self.video_len) | (kv >= self.video_len)
        near = ~kept
        dims = zip(self._coordinates(q), self._coordinates(kv), self._ranges_of(q), self.dilation, strict=True)
        for own, other, (first, last), step in dims:
            near = near & (other >= first) & (other <= last)
            if step > 1:
                near = near & (own % step == other % step)
        return kept | near

    def keeps_in(self, batch: Tensor | int, head: Tensor | int, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """`keeps` for one batch item and head; a neighborhood is the same for all."""
        return self.keeps(q_index, kv_index)

    def _raster_index(self, index: Tensor) -> Tensor:
        # 32 bits halve the time of what follows.
        return (index if self.raster is None else self.raster[index.long()]).to(torch.int32)

    def _coordinates(self, raster: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, height, width = self.grid
        return raster // (height * width), raster // width % height, raster % width

    def _ranges_of(self, raster: Tensor) -> list[tuple[Tensor, Tensor]]:
        """First and last kept coordinate per dimension; those of some grid token for text."""
        offsets = itertools.accumulate(self.grid, initial=0)
        coordinates = self._coordinates(raster.clamp(max=self.video_len - 1))
        found = [self.ranges[(c + o).long()] for c, o in zip(coordinates, offsets, strict=False)]
        return [(pair[..., 0], pair[..., 1]) for pair in found]

    def pairs_per_block(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Tensor:
        """Counts the kept pairs of every block exactly: by bounding boxes, and pair by pair where a block is cut.

        Returns:
            int64 `[ceil(q_len / block_q), ceil(kv_len / block_kv)]` on the device of `ranges`.
        """
        sizes = (q_len, kv_len, block_q, block_kv)
        full, empty = self._certain_blocks(*sizes)
        counts = torch.where(full, block_area(*sizes, self.ranges.device), 0)
        rows, cols = (~full & ~empty).nonzero(as_tuple=True)
        step = max(1, _COUNT_CHUNK // (block_q * block_kv))
        for row, col in zip(rows.split(step), cols.split(step), strict=True):
            q = row[:, None] * block_q + torch.arange(block_q, device=row.device)
            kv = col[:, None] * block_kv + torch.arange(block_kv, device=col.device)
            inside = (q < q_len)[:, :, None] & (kv < kv_len)[:, None, :]
            kept = self.keeps(q.clamp(max=q_len - 1)[:, :, None], kv.clamp(max=kv_len - 1)[:, None, :])
            counts[row, col] = (kept & inside).sum((1, 2))
        return counts

    def _certain_blocks(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> tuple[Tensor, Tensor]:
        """Blocks that are surely full and surely empty, by what their bounding boxes say."""
        device = self.ranges.device
        q, kv = (self._raster_index(torch.arange(n, device=device)) for n in (q_len, kv_len))
        q_text, kv_text = q >= self.video_len, kv >= self.video_len
        full = torch.ones(-(-q_len // block_q), -(-kv_len // block_kv), dtype=torch.bool, device=device)
        apart = torch.zeros_like(full)
        for other, (first, last), step in zip(self._coordinates(kv), self._ranges_of(q), self.dilation, strict=True):
            low, high = _extremes(other, other, ~kv_text, block_kv)
            first_low, last_high = _extremes(first, last, ~q_text, block_q)
            last_low, first_high = _extremes(last, first, ~q_text, block_q)
            apart |= (low > last_high[:, None]) | (high < first_low[:, None])
            full &= (low >= first_high[:, None]) & (high <= last_low[:, None]) & (step == 1)
        any_text = _any_in_blocks(q_text, block_q)[:, None] | _any_in_blocks(kv_text, block_kv)
        return full, apart & ~any_text

    def in_order(self, order: Tensor) -> Neighborhood:
        """The same test for a plan whose position p holds token `order[p]`, unless it knows its positions already."""
        return self if self.raster is not None else replace(self, raster=order.to(self.ranges.device, torch.int32))

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it holds."""
        return (self.ranges,) if self.raster is None else (self.ranges, self.raster)

    def to(self, device: torch.device | str) -> Neighborhood:
        """Copies the test to `device`."""
        raster = None if self.raster is None else self.raster.to(device)
        return replace(self, ranges=self.ranges.to(device), raster=raster)

    def check_fit(self, q_len: int, kv_len: int, block_q: int, block_kv: int, lead: tuple[int, int]) -> None:
        """Raises ValueError if a plan of these sizes cannot carry the test."""
        if self.raster is not None and self.raster.numel() < max(q_len, kv_len):
            raise ValueError(
                f"Neighborhood.raster names {self.raster.numel()} positions, the plan has {max(q_len, kv_len)}. Give "
                "the raster index of every position."
            )


def _per_dim(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ValueError(f"{name} has {len(values)} entries for a grid of {dims} dimensions: give one, or {dims}.")
    return values


def _ranges(length: int, window: int, stride: int, dilation: int, causal: bool) -> list[tuple[int, int]]:
    """First and last kept coordinate for every query coordinate of one dimension."""
    if window < 1 or dilation < 1 or window * dilation > length:
        raise ValueError(
            f"window {window} with dilation {dilation} does not fit a dimension of {length}: both are at least 1, and "
            "their product at most the dimension."
        )
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must lie between 1 and the window, {window}.")
    out = []
    for i in range(length):
        group, place = i % dilation, i // dilation
        size = length // dilation + (group < length % dilation)
        leader = min(place // stride * stride + (stride - 1 if causal else stride // 2), size - 1)
        first = max(leader - window + 1, 0) if causal else min(max(leader - window // 2, 0), size - window)
        last = place if causal else first + window - 1
        out.append((first * dilation + group, last * dilation + group))
    return out


def _extremes(small: Tensor, large: Tensor, valid: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Least of `small` and greatest of `large` in each block, over valid entries; (max, -1) where there are none."""
    least = torch.where(valid, small, torch.iinfo(small.dtype).max)
    greatest = torch.where(valid, large, -1)
    short = -small.numel() % block
    least = torch.nn.functional.pad(least, (0, short), value=torch.iinfo(small.dtype).max)
    greatest = torch.nn.functional.pad(greatest, (0, short), value=-1)
    return least.view(-1, block).amin(-1), greatest.view(-1, block).amax(-1)


def _any_in_blocks(flags: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(flags, (0, -flags.numel() % block)).view(-1, block).any(-1)


PairTest: TypeAlias = Band | Neighborhood | Bitmap


class BlockMaps(NamedTuple):
    """What a pair test makes of each block; bool `[NQ, NK]`, for a `Bitmap` `[B|1, H|1, NQ, NK]`.

    Attributes:
        full: Every pair is kept.
        partial: Some pairs are kept.  Blocks in neither map are empty.
    """

    full: Tensor
    partial: Tensor


def blocks_of(test: PairTest, q_len: int, kv_len: int, block_q: int, block_kv: int) -> BlockMaps:
    """Sorts blocks into full, partial and empty ones, exactly.

    Args:
        test: The pair test, for positions of the plan.
        q_len: Query tokens.
        kv_len: Key tokens.
        block_q: Queries per block.
        block_kv: Keys per block.

    Returns:
        Both maps, on the device of the test.
    """
    pairs = test.pairs_per_block(q_len, kv_len, block_q, block_kv)
    area = block_area(q_len, kv_len, block_q, block_kv, pairs.device)
    return BlockMaps(pairs == area, (pairs > 0) & (pairs < area))


def block_area(q_len: int, kv_len: int, block_q: int, block_kv: int, device: torch.device) -> Tensor:
    """Pairs of each block, int64 `[NQ, NK]`; the last blocks may be short."""
    heights, widths = (
        (length - torch.arange(0, length, block, device=device)).clamp(max=block)
        for length, block in ((q_len, block_q), (kv_len, block_kv))
    )
    return heights[:, None] * widths


class PairKind(IntEnum):
    """Names of the pair tests in the operator and, as compile-time constants, in the kernels."""

    NONE = 0
    BAND = 1
    NEIGHBORHOOD = 2
    PERMUTED_NEIGHBORHOOD = 3
    BITMAP = 4


class EncodedTest(NamedTuple):
    """A pair test as the operator carries it; a further test needs a kind, not another argument.

    Attributes:
        kind: A `PairKind`.
        table: int32, `Band.widths`, `Neighborhood.ranges` or `Bitmap.slots`.
        lookup: int32, `Neighborhood.raster` or `Bitmap.words`.
        numbers: Band: frame_tokens, video_len, sink_tokens.  Neighborhood: grid, dilation.  Bitmap: block_kv.
    """

    kind: int
    table: Tensor | None
    lookup: Tensor | None
    numbers: list[int]


def encode(test: PairTest | None) -> EncodedTest:
    """Takes a pair test apart for the operator."""
    if isinstance(test, Band):
        return EncodedTest(
            int(PairKind.BAND), test.widths, None, [test.frame_tokens, test.video_len, test.sink_tokens]
        )
    if isinstance(test, Neighborhood):
        kind = PairKind.NEIGHBORHOOD if test.raster is None else PairKind.PERMUTED_NEIGHBORHOOD
        return EncodedTest(int(kind), test.ranges, test.raster, [*test.grid, *test.dilation])
    if isinstance(test, Bitmap):
        return EncodedTest(int(PairKind.BITMAP), test.slots, test.words, [test.block_kv])
    return EncodedTest(int(PairKind.NONE), None, None, [])


def decode(kind: int, table: Tensor | None, lookup: Tensor | None, numbers: Sequence[int]) -> PairTest | None:
    """The inverse of `encode`."""
    if kind == PairKind.NONE:
        return None
    assert table is not None
    if kind == PairKind.BAND:
        return Band(numbers[0], table, numbers[1], numbers[2])
    if kind == PairKind.BITMAP:
        assert lookup is not None
        return Bitmap(table, lookup, numbers[0])
    (frames, height, width, *steps) = numbers
    return Neighborhood((frames, height, width), (steps[0], steps[1], steps[2]), table, lookup)
