"""Sol-Attn from its formulas (arXiv 2607.24027), in double precision and loops over blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels.token_order import morton_order
from dit_accel.layout import TokenLayout
from dit_accel.processors import CompensatedAttnProcessor


def sequence(layout: TokenLayout, morton: bool) -> list[int]:
    """Which token is at each position: video tokens along Morton's curve, all others where they are."""
    tokens = list(range(layout.length))
    if morton:
        start, stop = layout.visual
        tokens[start:stop] = [start + int(place) for place in morton_order(layout.grid)]
    return tokens


def blocks_of(layout: TokenLayout, processor: CompensatedAttnProcessor) -> list[Tensor]:
    """The tokens of every block."""
    return list(torch.tensor(sequence(layout, processor.morton)).split(processor.block))


def exact_blocks(
    processor: CompensatedAttnProcessor, layout: TokenLayout, q: Tensor, k: Tensor, scale: float
) -> list[set[int]]:
    """For one head, ``[tokens, head_dim]``: the blocks that each row of blocks attends to key by key."""
    blocks = blocks_of(layout, processor)
    first, last = layout.text or (0, 0)
    text = {j for j, block in enumerate(blocks) if any(first <= token < last for token in block.tolist())}
    centers, means = (torch.stack([x[block].double().mean(0) for block in blocks]) for x in (q, k))
    rows = []
    for i, center in enumerate(centers):
        if i in text:
            rows.append(set(range(len(blocks))))
        elif processor.density is None:
            neighbors = {j for j in range(len(blocks)) if abs(i - j) <= 1}
            rows.append(text | neighbors | _above(processor, center, means, scale))
        else:
            scores = [float(center @ mean) * scale + math.log(len(b)) for mean, b in zip(means, blocks, strict=True)]
            ranked = [j for _, _, j in sorted((j not in text, -score, j) for j, score in enumerate(scores))]
            rows.append(set(ranked[: max(len(text), math.ceil(processor.density * len(blocks) - 1e-9))]))
    return rows


def _above(processor: CompensatedAttnProcessor, center: Tensor, means: Tensor, scale: float) -> set[int]:
    """Blocks whose mean score stands out by tau standard deviations."""
    assert processor.tau is not None  # else a density decides
    a = scale * math.log2(math.e)
    scores = means @ center
    if processor.variance == "exact":
        variance = float(((scores - scores.mean()) ** 2).mean())
    else:
        variance = sum(
            float(c) ** 2 * float(((d - d.mean()) ** 2).mean()) for c, d in zip(center, means.T, strict=True)
        )
    threshold = a * float(scores.mean()) + processor.tau * math.sqrt(a * a * variance + 1e-6)
    return {j for j, score in enumerate(scores) if a * float(score) > threshold}


def attention(
    processor: CompensatedAttnProcessor,
    layout: TokenLayout,
    rows: Sequence[set[int]],
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> Tensor:
    """For one head: softmax over the keys of a row's exact blocks and the mean keys of all others, in double."""
    q, k, v = (x.double() for x in qkv)
    blocks = blocks_of(layout, processor)
    out = torch.full_like(q, math.nan)
    for block, exact in zip(blocks, rows, strict=True):
        shares, values = [], []
        for j, keys in enumerate(blocks):
            if j in exact:
                shares.append((q[block] @ k[keys].T * scale).exp())
                values.append(v[keys])
            elif processor.compensate:
                shares.append(len(keys) * (q[block] @ k[keys].mean(0) * scale).exp()[:, None])
                values.append(v[keys].mean(0, keepdim=True))
        weights = torch.cat(shares, 1)
        out[block] = weights @ torch.cat(values) / weights.sum(1, keepdim=True)
    return out


def every_head(
    processor: CompensatedAttnProcessor, layout: TokenLayout, q: Tensor, k: Tensor, scale: float | None = None
) -> list[list[list[set[int]]]]:
    """:func:`exact_blocks` of every batch item and head of ``[batch, heads, tokens, head_dim]``."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return [
        [exact_blocks(processor, layout, *head, factor) for head in zip(*item, strict=True)]
        for item in zip(q, k, strict=True)
    ]


def every_output(
    processor: CompensatedAttnProcessor,
    layout: TokenLayout,
    rows: list[list[list[set[int]]]],
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float | None = None,
) -> Tensor:
    """:func:`attention` likewise, float64 in the shape of the queries."""
    factor = qkv[0].shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty(qkv[0].shape, dtype=torch.float64)
    for b, item in enumerate(rows):
        for h, head in enumerate(item):
            out[b, h] = attention(processor, layout, head, (qkv[0][b, h], qkv[1][b, h], qkv[2][b, h]), factor)
    return out
