"""How much attention every token receives, from a sample of queries: O(rows * tokens) instead of O(tokens^2)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...controls import AttentionControl

if TYPE_CHECKING:
    from ...clock import StepState
    from ...controls import AttentionCall
    from ...layout import TokenLayout

Calls = dict[str, Tensor]  # by path of the module
_GOLDEN = (math.sqrt(5) - 1) / 2


def received_attention(query: Tensor, key: Tensor, rows: Tensor | None = None) -> Tensor:
    """The attention each key receives: exact softmax rows of some queries, averaged over these and the heads.

    A mean over keys for each query would be the constant ``1 / keys``; what tells tokens apart is the column mean.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, heads, keys, head_dim]``.
        rows: int64 ``[rows]``, the queries looked at; None for all.

    Returns:
        ``[batch, keys]`` float32 that sums to 1 over the keys. The scale of the scores is ``head_dim ** -0.5``.
    """
    picked = query if rows is None else query[:, :, rows.to(query.device)]
    total = torch.zeros(key.shape[0], key.shape[2], device=key.device)
    for head in range(picked.shape[1]):  # one head at a time: float32 copies of all keys would not fit
        scores = picked[:, head].float() @ key[:, head].float().transpose(-1, -2)
        total += (scores * query.shape[-1] ** -0.5).softmax(-1).mean(1)
    return total / picked.shape[1]


def sampled_rows(grid: tuple[int, int, int], count: int) -> Tensor:
    """Tokens spread evenly over frames, and within each frame.

    Each frame starts at another fraction of the stride (multiples of the golden ratio), or every frame would be looked
    at in the same columns whenever the stride divides the tokens of a frame.

    Args:
        grid: tokens along (frames, height, width).
        count: how many at most.

    Returns:
        int64 ``[min(count, tokens)]``, ascending places in the raster, all different.
    """
    frames, size = grid[0], grid[1] * grid[2]
    if count >= frames * size:
        return torch.arange(frames * size)
    shares = [count * (frame + 1) // frames - count * frame // frames for frame in range(frames)]
    rows = [
        frame * size + int((place + (frame + 1) * _GOLDEN % 1) * size / share)
        for frame, share in enumerate(shares)
        for place in range(share)
    ]
    return torch.tensor(rows)


class ReceivedAttentionRecorder(AttentionControl):
    """Records the attention that every video or image token receives, in the latest call of each module.

    :attr:`calls` maps the path of a module to ``[batch, tokens]`` float32 in raster order, on the device of the call.
    Queries are sampled among the video tokens; keys are all but padding. Whoever reads it clears it before the next
    call of the model.

    Args:
        rows: queries looked at.
        steps: sampling steps to look at; None for all.
        branches: as for :class:`~dit_accel.controls.AttentionControl`.

    Raises:
        ValueError: if ``rows`` is below 1.
    """

    def __init__(
        self, rows: int = 256, steps: Collection[int] | None = None, branches: Collection[str] | None = None
    ) -> None:
        super().__init__(kinds=("self", "joint"), branches=branches)
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows is a number of queries of at least 1, such as 256; got {rows!r}")
        self.rows, self.at = rows, None if steps is None else frozenset(steps)
        self.calls: Calls = {}

    def acts_at(self, state: StepState) -> bool:
        """Whether a call is one of those looked at."""
        return super().acts_at(state) and (self.at is None or state.step in self.at)

    def record(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Keeps the scores of this call."""
        layout = call.layout
        rows = sampled_rows(layout.grid, self.rows) + layout.visual[0]
        if layout.order is not None:  # position p holds token order[p]
            place = torch.argsort(layout.order)
            rows = place[rows.to(place.device)]
        scores = received_attention(query, key[:, :, : key.shape[2] - layout.padding], rows)
        self.calls[call.site.path] = in_raster(scores, layout)


def in_raster(scores: Tensor, layout: TokenLayout) -> Tensor:
    """Those of the video tokens, row by row.

    Args:
        scores: ``[batch, keys]``, by position in the sequence.
        layout: of the sequence.
    """
    if layout.order is not None:
        order = layout.order.to(scores.device)[: scores.shape[1]]
        scores = torch.empty_like(scores).index_copy_(1, order, scores)
    return scores[:, slice(*layout.visual)]


class WordAttentionRecorder(AttentionControl):
    """Records the share of attention that video tokens pay to some words, among all words.

    :attr:`calls` is like that of :class:`ReceivedAttentionRecorder`. In joint attention it is the softmax over the
    text keys alone, which costs O(tokens * words). Where a module attends to an image as well (Wan image to video),
    its call to the text comes last, and is the one that is kept.

    Args:
        words: places of the words among the text tokens, from 0.
        steps: sampling steps to look at; None for all.

    Raises:
        ValueError: if there are no words, or negative ones; in a call, if the text is shorter.
    """

    def __init__(self, words: Collection[int], steps: Collection[int] | None = None) -> None:
        super().__init__(kinds=("cross", "joint"))
        if not words or min(words) < 0:
            raise ValueError(f"words are places of text tokens, from 0, such as (2, 3); got {list(words)}")
        self.words, self.at = tuple(words), None if steps is None else frozenset(steps)
        self.calls: Calls = {}

    def acts_at(self, state: StepState) -> bool:
        """Whether a call is one of those looked at."""
        return self.at is None or state.step in self.at

    def record(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Keeps the shares of this call."""
        layout = call.layout
        is_joint = call.site.kind == "joint"
        if is_joint and layout.text is None:
            raise ValueError(f"{call.site.path} attends to no text, so a mask by words has nothing to go by")
        text = key[:, :, slice(*layout.text)] if is_joint and layout.text else key
        if max(self.words) >= text.shape[2]:
            raise ValueError(
                f"the text has {text.shape[2]} tokens, and word {max(self.words)} was asked for; give places from 0 "
                f"to {text.shape[2] - 1}"
            )
        self.calls[call.site.path] = in_raster(_shares(query, text, self.words), layout)


def _shares(query: Tensor, text: Tensor, words: tuple[int, ...]) -> Tensor:
    """Part of each query's softmax over the text that is on the words, mean over heads: ``[batch, queries]``."""
    picked = torch.tensor(words, device=text.device)
    total = torch.zeros(query.shape[0], query.shape[2], device=query.device)
    for head in range(query.shape[1]):
        scores = query[:, head].float() @ text[:, head].float().transpose(-1, -2) * query.shape[-1] ** -0.5
        total += scores.softmax(-1)[..., picked].sum(-1)
    return total / query.shape[1]
