"""Keys at equal distances that draw attention together: the grid pattern of MMInference (arXiv 2504.16083).

A line of stride n and phase p is every token whose place in the video is p modulo n: one place in all frames for the
length of a frame, one column for the length of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..precision import in_full_precision
from ..search.inputs import softmax_scale
from .probe import heads_at_a_time


class Lines(NamedTuple):
    """Where lines are looked for.

    Attributes:
        rows: int64 `[R]`, places in the sequence of the queries that are asked.
        video: int64 `[V]`, place in the sequence of every video token, in raster order.
        strides: The candidates, each from 1 to V.
    """

    rows: Tensor
    video: Tensor
    strides: tuple[int, ...]


def best_line(q: Tensor, k: Tensor, lines: Lines, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The line that draws most of the attention of some queries, beyond what its length would draw anyway.

    The mass of a line is what the queries give its keys, averaged over them.  Its excess is that less the share that
    an even spread of the video's mass would give it.  By mass alone the shortest of strides that divide each other
    would win always, since its lines hold those of the others.
    One operator while it is being compiled.

    Args:
        q: `[B, H, N, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, H, N, D]`, dtype and device of q.
        lines: Queries and strides.
        scale: Positive factor on the scores; `D ** -0.5` by default.

    Returns:
        int64 `[B, H]` each: which stride, the first of equals; and how many tokens stand before the line where all
        lines of that stride follow each other by rising phase.
    """
    factor = softmax_scale(scale, q.shape[-1])
    rows, video, strides = lines
    run = grid_lines if torch.compiler.is_compiling() else _lines
    choice, before = run(q.detach(), k.detach(), rows, video, list(strides), factor)
    return choice, before


def by_phase(tokens: int, stride: int) -> Tensor:
    """Video tokens line after line, by rising phase: int64 `[tokens]`, on the CPU."""
    places = torch.arange(tokens, device="cpu")
    return torch.argsort(places % stride * tokens + places)


@in_full_precision
def _lines(
    q: Tensor, k: Tensor, rows: Tensor, video: Tensor, strides: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    mass = _mass(q, k, rows, scale).index_select(-1, video).double()
    tokens = video.shape[0]
    choice = torch.zeros(mass.shape[:2], dtype=torch.int64, device=q.device)
    best, before = torch.full_like(choice, -torch.inf, dtype=torch.float64), torch.zeros_like(choice)
    for c, stride in enumerate(strides):
        sums = torch.nn.functional.pad(mass, (0, -tokens % stride)).unflatten(-1, (-1, stride)).sum(-2)
        lengths = (tokens - 1 - torch.arange(stride, device=q.device)) // stride + 1
        excess, phase = (sums - mass.sum(-1, keepdim=True) * lengths / tokens).max(-1)
        better = excess > best
        best, choice = torch.where(better, excess, best), torch.where(better, c, choice)
        # The first `tokens % stride` lines are longer by one.
        before = torch.where(better, phase * (tokens // stride) + phase.clamp(max=tokens % stride), before)
    return choice, before


def _mass(q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Attention that the queries give every key, averaged over them: float32 `[B, H, N]`."""
    asked = q.index_select(2, rows).float() * scale
    step = heads_at_a_time(q, rows, k.shape[2])
    parts = (slice(head, head + step) for head in range(0, q.shape[1], step))
    mass = [(asked[:, part] @ k[:, part].float().transpose(-1, -2)).softmax(-1).mean(-2) for part in parts]
    return torch.cat(mass, 1)


# Spelled out, since older torch releases do not read postponed annotations.
_SCHEMA = "(Tensor q, Tensor k, Tensor rows, Tensor video, int[] strides, float scale) -> (Tensor, Tensor)"

grid_lines = torch.library.custom_op("dit_accel::grid_lines", _lines, mutates_args=(), schema=_SCHEMA)
"""The search as one operator, so that compiled code finds the very lines that eager code does."""


@grid_lines.register_fake
def _(
    q: Tensor, k: Tensor, rows: Tensor, video: Tensor, strides: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    heads = q.shape[:2]
    return q.new_empty(heads, dtype=torch.int64), q.new_empty(heads, dtype=torch.int64)
