"""`Bitmap`, the pair test that can say anything: packed element masks of the blocks that are kept in part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Bits of one word.
WORD_BITS = 32
# Words whose bits are counted at a time, unless one entry has more; each takes about thirty bytes meanwhile.
_COUNT_WORDS = {"cpu": 1 << 17, "other": 1 << 22}


@dataclass(frozen=True, eq=False)
class Bitmap:
    """Any element test, one bit per pair; generic and slow.  `from_mask` packs it.

    Attributes:
        slots: int32 `[B|1, H|1, NQ, NK]`, which entry of `words` belongs to a block.
        words: int32 `[entries, block_q, ceil(block_kv / 32)]`; bit `c % 32` of word `c // 32` in row r says whether
            query r of the block keeps key c of the block.
        block_kv: Keys per block.
    """

    slots: Tensor
    words: Tensor
    block_kv: int

    def __post_init__(self) -> None:
        for name, tensor, dims in (("slots", self.slots, 4), ("words", self.words, 3)):
            if tensor.ndim != dims or tensor.dtype != torch.int32 or 0 in tensor.shape:
                raise ValueError(
                    f"Bitmap.{name} must be a non-empty int32 tensor of {dims} dimensions, got {tensor.dtype} of "
                    f"shape {tuple(tensor.shape)}. Bitmap.from_mask() makes both."
                )
        if self.block_kv < 1 or self.words.shape[2] != -(-self.block_kv // WORD_BITS):
            raise ValueError(
                f"Bitmap.words has {self.words.shape[2]} words per query; block_kv={self.block_kv} keys take "
                f"{-(-self.block_kv // WORD_BITS)}."
            )

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_q: int, block_kv: int) -> Bitmap:
        """Packs an element mask.  Waits for the device, to learn how many blocks are cut.

        Args:
            mask: bool `[B|1, H|1, q_len, kv_len]` or `[q_len, kv_len]`, in plan positions.
            block_q: Queries per block.
            block_kv: Keys per block.

        Returns:
            The bitmap; blocks kept whole share one entry, those dropped whole another.

        Raises:
            ValueError: The mask is not bool, or has another shape.
        """
        check_element_mask(mask, block_q, block_kv)
        mask = mask if mask.ndim == 4 else mask[None, None]
        some, cut = blocks_of_mask(mask, block_q, block_kv)
        slots = some.to(torch.int32)
        entries = cut.nonzero(as_tuple=True)
        slots[cut] = torch.arange(2, 2 + entries[0].numel(), dtype=torch.int32, device=mask.device)
        bits = torch.ones(2 + entries[0].numel(), block_q, block_kv, dtype=torch.bool, device=mask.device)
        bits[0] = False
        q_len, kv_len = mask.shape[-2:]
        padded = torch.nn.functional.pad(mask, (0, -kv_len % block_kv, 0, -q_len % block_q))
        blocked = padded.unflatten(-1, (-1, block_kv)).unflatten(-3, (-1, block_q)).transpose(-2, -3)
        bits[2:] = blocked[entries]
        return cls(slots, _pack(bits), block_kv)

    @property
    def block_q(self) -> int:
        """Queries per block."""
        return self.words.shape[1]

    def keeps(self, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """As `Band.keeps`, but bool `[B|1, H|1, ...]`: the answer may differ per batch item and head."""
        batch, heads = (torch.arange(n, device=self.slots.device) for n in self.slots.shape[:2])
        dims = (1,) * max(q_index.ndim, kv_index.ndim)
        return self.keeps_in(batch.view(-1, 1, *dims), heads.view(-1, *dims), q_index, kv_index)

    def keeps_in(self, batch: Tensor | int, head: Tensor | int, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """`keeps` for one batch item and head (or tensors of both, broadcastable against the positions)."""
        # A bitmap shared by all batch items or heads is asked at 0.
        batch, head = (i * (n > 1) for i, n in zip((batch, head), self.slots.shape[:2], strict=True))
        slot = self.slots[batch, head, q_index // self.block_q, kv_index // self.block_kv].long()
        column = kv_index % self.block_kv
        word = self.words[slot, q_index % self.block_q, column // WORD_BITS]
        return (word >> (column % WORD_BITS)) & 1 != 0

    def pairs_per_block(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Tensor:
        """Counts the set bits of every block, those behind the end left out.

        Returns:
            int64 `[B|1, H|1, NQ, NK]` on the device of `slots`.
        """
        slots = self.slots.long()
        tail_q, tail_kv = q_len - (slots.shape[2] - 1) * block_q, kv_len - (slots.shape[3] - 1) * block_kv
        whole, above = self._set_bits(block_kv, tail_q)
        counts = whole[slots]
        counts[..., -1, :] = above[slots[..., -1, :]]
        if tail_kv < block_kv:
            whole, above = self._set_bits(tail_kv, tail_q)
        counts[..., -1] = whole[slots[..., -1]]
        counts[..., -1, -1] = above[slots[..., -1, -1]]
        return counts

    def _set_bits(self, columns: int, rows: int) -> tuple[Tensor, Tensor]:
        """Counts the bits that each entry has set in its first columns: in all of its rows, and in the first `rows`.

        Returns:
            int64 `[entries]`, both.
        """
        device = self.words.device
        inside = _pack(torch.arange(self.words.shape[2] * WORD_BITS, device=device) < columns)
        step = max(1, _COUNT_WORDS["cpu" if device.type == "cpu" else "other"] // (self.block_q * self.words.shape[2]))
        whole, above = [], []
        for words in self.words.split(step):
            per_row = _bit_counts(words & inside).sum(-1)
            whole.append(per_row.sum(-1))
            above.append(per_row[:, :rows].sum(-1))
        return torch.cat(whole), torch.cat(above)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it holds."""
        return self.slots, self.words

    def to(self, device: torch.device | str) -> Bitmap:
        """Copies the bitmap to `device`."""
        return replace(self, slots=self.slots.to(device), words=self.words.to(device))

    def check_fit(self, q_len: int, kv_len: int, block_q: int, block_kv: int, lead: tuple[int, int]) -> None:
        """Raises ValueError if a plan of these sizes, with lists for `lead` batch items and heads, cannot carry it."""
        rows, cols = -(-q_len // block_q), -(-kv_len // block_kv)
        if (self.block_q, self.block_kv, *self.slots.shape[2:]) != (block_q, block_kv, rows, cols):
            raise ValueError(
                f"The bitmap is for {tuple(self.slots.shape[2:])} blocks of {self.block_q} x {self.block_kv}, the "
                f"plan has {(rows, cols)} blocks of {block_q} x {block_kv}. Cut both alike."
            )
        if any(n not in (1, m) for n, m in zip(self.slots.shape[:2], lead, strict=True)):
            raise ValueError(
                f"The bitmap is for {tuple(self.slots.shape[:2])} batch items and heads, the lists are for {lead}. "
                "Expand the lists to the bitmap's."
            )


def _pack(bits: Tensor) -> Tensor:
    """Bool `[..., C]` to int32 words `[..., ceil(C / 32)]`, lowest bit first."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % WORD_BITS)).unflatten(-1, (-1, WORD_BITS))
    # The highest bit is the sign.
    weights = 2 ** torch.arange(WORD_BITS, device=bits.device)
    words = (padded * weights).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def _bit_counts(words: Tensor) -> Tensor:
    """How many bits each int32 word has set, int32: neighbors are added up, in twos, fours, eights and so on.

    Shifts to the right fill up with the sign, which the masks take away again.
    """
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


def check_element_mask(mask: Tensor, block_q: int, block_kv: int) -> None:
    """Raises ValueError unless `mask` is an element mask that can be cut into such blocks."""
    if mask.dtype != torch.bool or mask.ndim not in (2, 4) or 0 in mask.shape or min(block_q, block_kv) < 1:
        raise ValueError(
            "An element mask is a non-empty bool tensor [batch or 1, heads or 1, q_len, kv_len] or [q_len, kv_len], "
            f"cut into blocks of at least 1; got {mask.dtype} of shape {tuple(mask.shape)} and blocks of {block_q} x "
            f"{block_kv}."
        )


def blocks_of_mask(mask: Tensor, block_q: int, block_kv: int) -> tuple[Tensor, Tensor]:
    """Blocks of `[..., q_len, kv_len]` that hold a True, and those of them that hold a False too; `[..., NQ, NK]`."""

    def holds_one(flags: Tensor) -> Tensor:
        q_len, kv_len = flags.shape[-2:]
        padded = torch.nn.functional.pad(flags, (0, -kv_len % block_kv, 0, -q_len % block_q))
        return padded.unflatten(-1, (-1, block_kv)).any(-1).unflatten(-2, (-1, block_q)).any(-2)

    some = holds_one(mask)
    return some, some & holds_one(~mask)
