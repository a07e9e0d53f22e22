"""Cheap estimates of which blocks matter, from means of blocks and of sub-blocks.

Pooled scores are what SpargeAttn (arXiv 2502.18137) and many others rank by; they miss blocks whose few strong pairs
drown in the mean.  Means of smaller sub-blocks, put together by log-sum-exp, see those for little more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .inputs import check_block, check_search, search_backend, softmax_scale, tokens_per_block

# Sub-block scores held in memory at a time, in elements, unless a single row of blocks has more.
_STRIP = {"cpu": 1 << 20, "other": 1 << 25}


def block_means(x: Tensor, block: int, *, backend: str = "auto") -> Tensor:
    """Averages the real tokens of each block, in float32.

    Args:
        x: `[B, S, H, D]`, float32, float16 or bfloat16, any strides.
        block: Tokens per block; the last block may be short.
        backend: "auto", "torch" or "triton".

    Returns:
        float32 `[B, H, ceil(S / block), D]`.

    Raises:
        ValueError: Wrong shape or dtype, or the named backend cannot run the call.
    """
    check_search(x, x, block, block)
    x = x.detach()
    if search_backend(backend, x).backend == "triton":
        # Triton takes a moment to import and is missing on many CPU installs.
        from .kernels import triton_block_means

        return triton_block_means(x, block)
    return differentiable_means(x, block)


def differentiable_means(x: Tensor, block: int) -> Tensor:
    """Averages the real tokens of each block in float32, with torch's own operators.

    Args:
        x: `[B, S, H, D]`, float32, float16 or bfloat16, any strides.
        block: Tokens per block; the last block may be short.

    Returns:
        float32 `[B, H, ceil(S / block), D]`.
    """
    whole = x.shape[1] // block
    parts = []
    if whole:
        parts.append(x[:, : whole * block].unflatten(1, (whole, block)).mean(2, dtype=torch.float32))
    if x.shape[1] % block:
        parts.append(x[:, whole * block :].mean(1, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 1).transpose(1, 2)


def pooled_scores(
    q: Tensor, k: Tensor, *, block_q: int, block_kv: int, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Scores each block by its mean query and mean key: `scale * mean(q) . mean(k)`, the mean score of its pairs.

    Args:
        q: `[B, q_len, H, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, kv_len, H, D]`, dtype and device of q.
        block_q: Queries per block; the last block may be short and is averaged over its real tokens.
        block_kv: Keys per block, likewise.
        scale: Positive factor on the scores; `D ** -0.5` by default.
        backend: Who takes the means: "auto", "torch" or "triton".  The product is torch's.

    Returns:
        float32 `[B, H, ceil(q_len / block_q), ceil(kv_len / block_kv)]`.

    Raises:
        ValueError: Shapes, dtypes, devices or block sizes do not fit, or the named backend cannot run the call.
    """
    check_search(q, k, block_q, block_kv)
    mean_q = block_means(q, block_q, backend=backend) * softmax_scale(scale, q.shape[-1])
    return mean_q @ block_means(k, block_kv, backend=backend).transpose(-1, -2)


def sub_block_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_kv: int,
    stride: int,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Estimates the log of each block's sum of exponentials from means over every `stride` tokens.

    `log sum_{a, b} n_a n_b exp(scale * mean_a(q) . mean_b(k))` over the sub-blocks a, b of n_a and n_b real tokens.
    By Jensen's inequality never above the truth, exact for stride 1, and no worse for a stride that divides another.

    Args:
        q: `[B, q_len, H, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, kv_len, H, D]`, dtype and device of q.
        block_q: Queries per block; the last block may be short.
        block_kv: Keys per block, likewise.
        stride: Tokens per sub-block, a divisor of both block sizes.  Costs `stride ** -2` of the dense scores.
        scale: Positive factor on the scores; `D ** -0.5` by default.
        backend: Who takes the means: "auto", "torch" or "triton".  The rest is torch's.

    Returns:
        float32 `[B, H, ceil(q_len / block_q), ceil(kv_len / block_kv)]`, natural log.

    Raises:
        ValueError: Shapes, dtypes, devices, block sizes or the stride do not fit, or the named backend cannot run.
    """
    check_search(q, k, block_q, block_kv)
    check_block("stride", stride)
    if block_q % stride or block_kv % stride:
        raise ValueError(f"stride must divide block_q={block_q} and block_kv={block_kv}, got {stride}.")
    fine_q, weight_q = _sub_means(q, block_q, stride, backend)
    fine_k, weight_k = _sub_means(k, block_kv, stride, backend)
    fine_q, fine_k = fine_q * softmax_scale(scale, q.shape[-1]), fine_k.transpose(-1, -2)
    per_row, per_col = block_q // stride, block_kv // stride
    rows, cols = weight_q.numel() // per_row, weight_k.numel() // per_col
    out = fine_q.new_empty(*fine_q.shape[:2], rows, cols)
    limit = _STRIP["cpu" if q.device.type == "cpu" else "other"]
    step = max(1, limit // (q.shape[0] * q.shape[2] * per_row * weight_k.numel()))
    for row in range(0, rows, step):
        part = slice(row * per_row, (row + step) * per_row)
        logits = fine_q[:, :, part] @ fine_k + weight_q[part, None] + weight_k
        out[:, :, row : row + step] = (
            logits.unflatten(2, (-1, per_row)).unflatten(4, (cols, per_col)).logsumexp((3, 5))
        )
    return out


def _sub_means(x: Tensor, block: int, stride: int, backend: str) -> tuple[Tensor, Tensor]:
    """Means over `stride` tokens, padded to whole blocks, and the log of how many tokens are in each (-inf: none)."""
    means = block_means(x, stride, backend=backend)
    count = -(-x.shape[1] // block) * (block // stride)
    weight = tokens_per_block(x.shape[1], stride, count, x.device).log()
    return pad(means, (0, 0, 0, count - means.shape[2])), weight
