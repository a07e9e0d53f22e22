"""Exact attention mass of every block: how much of the dense softmax falls into it.

This is the score by which AdaSpa (arXiv 2502.21079) picks blocks.  The log-sum-exp of the rows may come from an
earlier step, where it hardly differs; then one pass over the scores is enough instead of two.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from .inputs import check_search, search_backend, softmax_scale

# Scores held in memory at a time, in elements, unless a single row of blocks has more.
_STRIP = 1 << 22


@overload
def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = ...,
    lse: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = ...,
    lse: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Sums the softmax weights of every block: `mass[i, j] = sum exp(scale * q.k - lse_q)` over the pairs of a block.

    Streams over the scores and never waits for the device.  To look at every r-th query only, pass `q[:, ::r]`,
    `lse[..., ::r]` and `block_q // r`.

    Args:
        q: `[B, q_len, H, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, kv_len, H, D]`, dtype and device of q.
        block_q: Queries per block; the last block may be short.
        block_kv: Keys per block, likewise.
        scale: Positive factor on the scores; `D ** -0.5` by default.
        lse: Natural-log log-sum-exp of each query's scaled scores, float32 `[B, H, q_len]`, as `attend` returns it.
            Computed here if None.  A query with lse -inf counts nothing.
        return_lse: Also return the log-sum-exp, to be cached.
        backend: "auto", "torch" or "triton".

    Returns:
        float32 `[B, H, ceil(q_len / block_q), ceil(kv_len / block_kv)]`; with an exact lse each row sums to the number
        of its queries.  With `return_lse` `(mass, lse)`.

    Raises:
        ValueError: Shapes, dtypes, devices or block sizes do not fit, or the named backend cannot run the call.
    """
    check_search(q, k, block_q, block_kv)
    _check_lse(lse, q)
    scale = softmax_scale(scale, q.shape[-1])
    q, k = q.detach(), k.detach()
    if search_backend(backend, q, k, block_q=block_q, block_kv=block_kv).backend == "triton":
        # Triton takes a moment to import and is missing on many CPU installs.
        from .kernels import triton_block_mass, triton_row_lse

        lse = triton_row_lse(q, k, block_q, block_kv, scale) if lse is None else lse.detach()
        mass = triton_block_mass(q, k, lse, block_q, block_kv, scale)
    else:
        mass, lse = _torch_mass(q, k, None if lse is None else lse.detach(), block_q, block_kv, scale)
    return (mass, lse) if return_lse else mass


def _check_lse(lse: Tensor | None, q: Tensor) -> None:
    wanted = (q.shape[0], q.shape[2], q.shape[1])
    if lse is None:
        return
    if lse.dtype != torch.float32 or tuple(lse.shape) != wanted or lse.device != q.device:
        raise ValueError(
            f"lse must be float32 of shape {wanted} (batch, heads, queries) on {q.device}, got {lse.dtype} of shape "
            f"{tuple(lse.shape)} on {lse.device}."
        )


def _torch_mass(
    q: Tensor, k: Tensor, lse: Tensor | None, block_q: int, block_kv: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    mass = q.new_empty(batch, heads, -(-q_len // block_q), -(-kv_len // block_kv), dtype=torch.float32)
    found = q.new_empty(batch, heads, q_len, dtype=torch.float32) if lse is None else lse
    rows = max(1, _STRIP // (block_q * kv_len))
    for b in range(batch):
        for h in range(heads):
            keys = k[b, :, h].float().transpose(0, 1) * scale
            for row in range(0, mass.shape[2], rows):
                part = slice(row * block_q, min((row + rows) * block_q, q_len))
                scores = q[b, part, h].float() @ keys
                if lse is None:
                    found[b, h, part] = scores.logsumexp(-1)
                weights = scores.sub_(_countable(found[b, h, part])[:, None]).exp_()
                mass[b, h, row : row + rows] = _sum_blocks(_sum_blocks(weights, 0, block_q), 1, block_kv)
    return mass, found


def _countable(lse: Tensor) -> Tensor:
    """Turns the lse of queries without any key around, so that their weights become 0 instead of infinite."""
    return lse.masked_fill(lse == float("-inf"), float("inf"))


def _sum_blocks(x: Tensor, dim: int, block: int) -> Tensor:
    short = -x.shape[dim] % block
    if short:
        x = pad(x, (0, short) if dim == 1 else (0, 0, 0, short))
    return x.unflatten(dim, (-1, block)).sum(dim + 1)
