"""Where the tokens of an attention call are: text, video grid, reference images, padding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Range = tuple[int, int]


@dataclass(frozen=True)
class TokenLayout:
    """The order of tokens as the attention kernel sees them.

    Video tokens run frame by frame, row by row. Ranges are half-open ``(start, stop)`` positions in the sequence.

    Attributes:
        grid: tokens along (frames, height, width); images have one frame.
        visual: range of the video or image tokens; its length is the product of ``grid``.
        text: range of text tokens that take part in self-attention, or None (Wan keeps text in cross-attention).
        references: ranges of reference-image tokens.
        padding: number of padding tokens at the end of the sequence.
        order: int64 ``[length]`` where a token permutation is at work (``install/permutation.py``): position p of the
            sequence then holds token ``order[p]`` of the ranges and the grid above. None: token p.
    """

    grid: tuple[int, int, int]
    visual: Range
    text: Range | None = None
    references: tuple[Range, ...] = ()
    padding: int = 0
    order: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        frames, height, width = self.grid
        if min(self.grid) < 1:
            raise ValueError(f"a token grid needs at least one token along each axis; got {self.grid}")
        if self.visual[1] - self.visual[0] != frames * height * width:
            raise ValueError(f"the visual range {self.visual} does not hold the {frames}x{height}x{width} grid")

    @property
    def frame_tokens(self) -> int:
        """Tokens in one frame."""
        return self.grid[1] * self.grid[2]

    @property
    def text_tokens(self) -> int:
        """Text tokens in the sequence."""
        return self.text[1] - self.text[0] if self.text else 0

    @property
    def length(self) -> int:
        """All tokens of the sequence, padding included."""
        stops = [self.visual[1], *(part[1] for part in self.references), *([self.text[1]] if self.text else [])]
        return max(stops) + self.padding

    def without_end(self, count: int) -> TokenLayout:
        """The layout of the sequence without its last tokens, which must be text.

        Raises:
            ValueError: if there are not as many tokens of text at the end.
        """
        if not count:
            return self
        if self.text is None or self.text[1] != self.length or self.text_tokens < count:
            raise ValueError(f"the last {count} tokens of {self} are not all text, so they cannot be padding")
        stop = self.text[1] - count
        order = None if self.order is None else self.order[: self.length - count]
        return replace(self, text=(self.text[0], stop) if stop > self.text[0] else None, order=order)

    @classmethod
    def video_only(cls, grid: tuple[int, int, int]) -> TokenLayout:
        """A sequence of nothing but video tokens, or the image tokens of a one-frame grid."""
        frames, height, width = grid
        return cls(grid, (0, frames * height * width))
