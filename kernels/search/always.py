"""Blocks that are kept whatever their score: text, sinks, reference frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]


def always_blocks(
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    *,
    always_q: Ranges = (),
    always_kv: Ranges = (),
    device: torch.device | str | None = None,
) -> Tensor:
    """Marks the blocks that token ranges touch.

    Args:
        q_len: Query tokens.
        kv_len: Key tokens.
        block_q: Queries per block.
        block_kv: Keys per block.
        always_q: Query ranges `(start, stop)` that see everything.
        always_kv: Key ranges that everyone sees.
        device: Where the result lives.

    Returns:
        bool `[ceil(q_len / block_q), ceil(kv_len / block_kv)]`.

    Raises:
        ValueError: A range does not lie within its length.
    """
    rows = _touched("always_q", always_q, q_len, block_q, device)
    cols = _touched("always_kv", always_kv, kv_len, block_kv, device)
    return rows[:, None] | cols


def _touched(name: str, ranges: Ranges, length: int, block: int, device: torch.device | str | None) -> Tensor:
    starts = torch.arange(0, length, block, device=device)
    touched = torch.zeros_like(starts, dtype=torch.bool)
    for start, stop in ranges:
        if not 0 <= start <= stop <= length:
            raise ValueError(f"{name} holds ({start}, {stop}), which is not a range within [0, {length}].")
        if start < stop:
            touched = touched | ((starts < stop) & (starts + block > start))
    return touched
