"""A video grid cut into cells that are kept or dropped as a whole, whatever blocks a kernel walks.

A plan knows blocks of one length; cells have any length, and those at the far borders of a grid that they do not
divide are smaller.  So the plan runs in the order of the cells, one after the other, and a key block that holds tokens
of several cells gets an element test that parts them: padding every cell to whole blocks would give the same pairs,
but a plan cannot hold tokens that do not exist.  All of this follows from the grid and is made once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bitmap import WORD_BITS
from ..token_order import Grid, inverse_order, tile_order

# Key blocks that touch up to so many cells have a ready bitmap for every subset of them, others one for each row.
SUBSET_CELLS = 5


class Cells(NamedTuple):
    """Cells of one grid, and how they lie in the blocks of a plan.

    Plan positions run cell by cell; tokens that belong to no cell (text) are all at the end.  They are one more
    column, behind those of the cells, in everything that counts columns.

    Attributes:
        order: int64 `[N]`, the token at each plan position.
        tokens: Tokens in cells; they have the first positions.
        block_q: Queries per plan block.
        block_kv: Keys per plan block.
        members: int64 `[P, largest]`, the tokens of each cell, then zeros.
        sizes: int64 `[P]`, tokens of each cell.
        own: bool `[rows, P]`, cells of the tokens of each query block that has tokens in cells.
        queries: int64 `[rows]`, tokens in cells of each query block.
        first: int64 `[NK]`, the first column that a key block holds tokens of.
        touched: int64 `[NK]`, how many.
        base: int64 `[NK]`, entry of `words` for the empty subset of those columns; -1 for crowded blocks.
        words: int32 `[entries, block_q, ceil(block_kv / 32)]`, see `Bitmap`.
        crowded: int64 `[C]`, the key blocks that touch more than `SUBSET_CELLS` columns.
        columns: int64 `[C, block_kv]`, the column of each of their tokens.
    """

    order: Tensor
    tokens: int
    block_q: int
    block_kv: int
    members: Tensor
    sizes: Tensor
    own: Tensor
    queries: Tensor
    first: Tensor
    touched: Tensor
    base: Tensor
    words: Tensor
    crowded: Tensor
    columns: Tensor

    @property
    def cuts(self) -> bool:
        """Whether a key block may be kept in part."""
        return self.words.shape[0] > 0 or self.crowded.numel() > 0


def grid_cells(
    grid: Grid,
    cell: Grid,
    *,
    block_q: int,
    block_kv: int,
    start: int = 0,
    length: int | None = None,
    sequence: Tensor | None = None,
    cut: bool = True,
    device: torch.device | str | None = None,
) -> Cells:
    """Cuts a grid into cells.  Waits for the device; call it once per grid.

    Args:
        grid: Video tokens along (frames, height, width).
        cell: Tokens of a cell along the same axes.  Need not divide the grid; sides beyond the grid's mean all of it.
        block_q: Queries per plan block.
        block_kv: Keys per plan block.
        start: Where the video begins in the sequence.
        length: Tokens of the sequence; all that is not video belongs to no cell.
        sequence: int64 `[length]`, the token at each position of tensors that were permuted already, or None.
        cut: Whether key blocks that hold kept and dropped cells are parted, exactly, or kept whole.
        device: Where the tables are made.

    Raises:
        ValueError: A side below 1, or a video that does not fit into the sequence.
    """
    tokens = math.prod(grid)
    length = start + tokens if length is None else length
    if start < 0 or start + tokens > length:
        raise ValueError(f"{tokens} video tokens from position {start} on do not fit into a sequence of {length}.")
    cell = _clipped(cell, grid)
    inside = tile_order(grid, cell)
    rest = torch.cat((torch.arange(start), torch.arange(start + tokens, length)))
    order = torch.cat((inside + start, rest))
    label = _labels(grid, cell)[inside]  # of each plan position, ascending
    if sequence is not None:
        order = inverse_order(sequence.cpu())[order]
    sizes = torch.bincount(label)
    column = torch.cat((label, label.new_full((rest.numel(),), sizes.numel())))
    first, count = _touched(column, block_kv)
    single = not cut or int(count.max()) == 1
    base, words = _subsets(column, first, count, block_q, block_kv, single)
    crowded = torch.arange(0) if single else (count > SUBSET_CELLS).nonzero()[:, 0]
    tables = Cells(
        order=order,
        tokens=tokens,
        block_q=block_q,
        block_kv=block_kv,
        members=_members(order[:tokens], label, sizes),
        sizes=sizes,
        own=_own(label, sizes.numel(), block_q),
        queries=(tokens - torch.arange(0, tokens, block_q)).clamp(max=block_q),
        first=first,
        touched=count,
        base=base,
        words=words,
        crowded=crowded,
        columns=_blocked(column, block_kv)[crowded],
    )
    if device is None:
        return tables
    moved: dict[str, Any] = {n: x.to(device) for n, x in tables._asdict().items() if isinstance(x, Tensor)}
    return tables._replace(**moved)


def aligned_block(grid: Grid, cell: Grid, block: int, multiple: int = 1) -> int:
    """The greatest key block from half of `block` up to it of which every cell is made up exactly, else `block`.

    Args:
        grid: Video tokens along (frames, height, width).
        cell: Tokens of a cell along the same axes.
        block: The block that was asked for.
        multiple: What the length of a block must be a multiple of.
    """
    cell = _clipped(cell, grid)
    # The sides of a cut cell divide like those of the grid, so three whole sides and three cut ones say all.
    common = math.prod(math.gcd(side, length) for side, length in zip(cell, grid, strict=True))
    fitting = [n for n in range(-(-block // 2), block + 1) if common % n == 0 and n % multiple == 0]
    return max(fitting, default=block)


def _clipped(cell: Grid, grid: Grid) -> Grid:
    frames, height, width = (min(side, length) for side, length in zip(cell, grid, strict=True))
    return frames, height, width


def _labels(grid: Grid, cell: Grid) -> Tensor:
    """The cell of each raster token."""
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    for axis, (length, side) in enumerate(zip(grid, cell, strict=True)):
        shape = [1, 1, 1]
        shape[axis] = length
        label = label * -(-length // side) + (torch.arange(length) // side).view(shape)
    return label.expand(grid).flatten()


def _blocked(column: Tensor, block: int) -> Tensor:
    """`[blocks, block]`; the last block is filled up with its last column, which no kernel looks at."""
    missing = -column.numel() % block
    return torch.cat((column, column[-1:].expand(missing))).view(-1, block)


def _touched(column: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocked = _blocked(column, block)
    return blocked[:, 0].clone(), blocked[:, -1] - blocked[:, 0] + 1


def _members(order: Tensor, label: Tensor, sizes: Tensor) -> Tensor:
    starts = sizes.cumsum(0) - sizes
    members = order.new_zeros(sizes.numel(), int(sizes.max()))
    members[label, torch.arange(label.numel()) - starts[label]] = order
    return members


def _own(label: Tensor, cells: int, block: int) -> Tensor:
    own = torch.zeros(-(-label.numel() // block), cells, dtype=torch.bool)
    own[torch.arange(label.numel()) // block, label] = True
    return own


def _subsets(
    column: Tensor, first: Tensor, count: Tensor, block_q: int, block_kv: int, single: bool
) -> tuple[Tensor, Tensor]:
    """A bitmap for every subset of the columns that a key block touches; bit i of its number stands for column i."""
    width = -(-block_kv // WORD_BITS)
    if single:
        return torch.zeros_like(first), torch.zeros(0, block_q, width, dtype=torch.int32)
    entries = torch.where(count <= SUBSET_CELLS, 2 ** count.clamp(max=SUBSET_CELLS), 0)
    base = torch.where(entries > 0, entries.cumsum(0) - entries, -1)
    block = torch.arange(first.numel()).repeat_interleave(entries)
    subset = torch.arange(block.numel()) - base[block]
    local = (_blocked(column, block_kv) - first[:, None])[block]
    words = packed_words((subset[:, None] >> local) & 1)
    return base, words[:, None].expand(-1, block_q, -1).contiguous()


def packed_words(bits: Tensor) -> Tensor:
    """Bits `[..., n]` (bool, or 0 and 1) as int32 words `[..., ceil(n / 32)]`, lowest bit first."""
    filled = torch.nn.functional.pad(bits.long(), (0, -bits.shape[-1] % WORD_BITS)).unflatten(-1, (-1, WORD_BITS))
    words = (filled << torch.arange(WORD_BITS, device=bits.device)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)  # the highest bit is the sign
