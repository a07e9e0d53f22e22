"""What a block gate sees of queries and keys: one vector for each block.

Source: SeerAttention, arXiv 2410.13276, whose search over pooling operators found the mean best for queries, and
maximum, minimum and mean side by side for keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..search.inputs import check_search
from ..search.pooled import differentiable_means


def pooled_queries(q: Tensor, block: int) -> Tensor:
    """The mean query of each block.

    Args:
        q: `[B, S, H, D]`, float32, float16 or bfloat16, any strides.
        block: Tokens per block; the last block may be short and is averaged over its real tokens.

    Returns:
        float32 `[B, H, ceil(S / block), D]`.

    Raises:
        ValueError: Wrong shape, dtype or block size.
    """
    check_search(q, q, block, block)
    return differentiable_means(q, block)


def pooled_keys(k: Tensor, block: int) -> Tensor:
    """The greatest, the least and the mean value of each channel over the keys of each block, side by side.

    Args:
        k: `[B, S, H, D]`, float32, float16 or bfloat16, any strides.
        block: Tokens per block; a short last block is pooled over its real tokens.

    Returns:
        float32 `[B, H, ceil(S / block), 3 * D]`.

    Raises:
        ValueError: Wrong shape, dtype or block size.
    """
    check_search(k, k, block, block)
    whole = k.shape[1] // block * block
    parts = [k[:, :whole].unflatten(1, (-1, block))] if whole else []
    if whole < k.shape[1]:
        parts.append(k[:, None, whole:])
    extremes = [torch.cat([reduce(part, 2) for part in parts], 1) for reduce in (torch.amax, torch.amin)]
    greatest, least = (found.float().transpose(1, 2) for found in extremes)
    return torch.cat((greatest, least, differentiable_means(k, block)), -1)
