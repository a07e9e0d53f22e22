"""What a block gate learns: the true attention map, seen block by block.

Source: SeerAttention, arXiv 2410.13276: the two-dimensional maximum of the softmax map over each block.  Its sum, the
mass of a block, is what a plan that leaves blocks out should keep.  The map itself, tokens by tokens, is never held:
a strip of query blocks at a time is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import in_full_precision
from ..search.inputs import check_search, softmax_scale

_STRIP = 1 << 22  # scores held in memory at a time, in elements, unless a single row of blocks has more


@in_full_precision
def block_maps(
    q: Tensor, k: Tensor, block: int, *, rows: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The greatest softmax weight in each block, and the share of the softmax that falls into it.

    Args:
        q: `[B, S, H, D]`, float32, float16 or bfloat16.
        k: `[B, S', H, D]`, dtype and device of q.
        block: Tokens per block of queries and of keys; the last ones may be short.
        rows: int64, the query blocks that are wanted, ascending; all by default.
        scale: Positive factor on the scores; `D ** -0.5` by default.

    Returns:
        `(greatest, share)`, float32 `[B, H, rows, ceil(S' / block)]`; a row of shares sums to 1.

    Raises:
        ValueError: Shapes, dtypes or the block size do not fit together.
    """
    check_search(q, k, block, block)
    scale = softmax_scale(scale, q.shape[-1])
    count = -(-q.shape[1] // block)
    chosen = range(count) if rows is None else rows.tolist()
    keys = k.detach().permute(0, 2, 3, 1).float() * scale
    greatest, share = [], []
    for b in range(q.shape[0]):
        for index in chosen:
            strip = q.detach()[b, index * block : (index + 1) * block].transpose(0, 1).float()
            for heads in torch.arange(q.shape[2]).split(max(1, _STRIP // (block * k.shape[1]))):
                part = slice(int(heads[0]), int(heads[-1]) + 1)
                weights = _blocks((strip[part] @ keys[b, part]).softmax(-1), block)
                greatest.append(weights.amax((1, 3)))
                share.append(weights.sum(3).mean(1))
    shape = (q.shape[0], len(chosen), q.shape[2], -1)
    return _stacked(greatest, shape), _stacked(share, shape)


def teacher(map_of_blocks: Tensor) -> Tensor:
    """Turns one of the two maps into the distributions that a gate is to learn.

    Args:
        map_of_blocks: `[..., rows, columns]`, not negative.

    Returns:
        The same shape; rows sum to 1.
    """
    return map_of_blocks / map_of_blocks.sum(-1, keepdim=True).clamp(min=1e-30)


def _blocks(weights: Tensor, block: int) -> Tensor:
    """`[heads, queries, keys]` to `[heads, queries, key blocks, block]`."""
    return pad(weights, (0, -weights.shape[-1] % block)).unflatten(-1, (-1, block))


def _stacked(parts: list[Tensor], shape: tuple[int, int, int, int]) -> Tensor:
    return torch.cat(parts).view(shape).transpose(1, 2)
