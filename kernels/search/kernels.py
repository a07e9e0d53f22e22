"""Search kernels in Triton: row log-sum-exp, exact block mass and block means.

Importing this module imports Triton but needs neither a GPU nor a driver.
"""

# Kernel arguments are device values, for which Python has no types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_kernels.generation import capability_of

_LOG2_E = 1.4426950408889634


@triton.jit
def _load_tile(base, start, stride, limit, offsets, dims, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Loads rows `start + offsets` of a [tokens, HEAD_DIM] matrix; zeros behind `limit` and behind HEAD_DIM."""
    # The start goes into the pointer in 64 bits, so that offsets within the tile stay small 32-bit numbers.
    pointers = base + tl.cast(start, tl.int64) * stride + offsets[:, None] * stride + dims[None, :]
    if MASKED:
        return tl.load(pointers, mask=(start + offsets < limit)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _tile_scores(q, K, start, stride, kv_len, offsets, dims, scale_log2, HEAD_DIM, MASKED, PRECISION: tl.constexpr):
    """Base-2 scores of a tile of queries against the keys from `start`; -inf behind the end if MASKED."""
    PADDED: tl.constexpr = dims.shape[0] != HEAD_DIM
    k = _load_tile(K, start, stride, kv_len, offsets, dims, HEAD_DIM, MASKED or PADDED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if MASKED:
        scores = tl.where((start + offsets < kv_len)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _fold(scores, top, total):
    """Folds one tile of base-2 scores into the running maximum and sum."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    return new_top, total * tl.math.exp2(top - new_top) + tl.sum(tl.math.exp2(scores - new_top[:, None]), 1)


@triton.jit
def row_lse_kernel(
    Q,
    K,
    Lse,
    scale_log2,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    lse_stride_b,
    lse_stride_h,
    heads,
    q_len,
    kv_len,
    HEAD_DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Log-sum-exp of one tile of queries over all keys, natural log; grid (tiles, batch * heads)."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    start_m = tl.program_id(0) * TILE_M
    Q += batch * q_stride_b + head * q_stride_h
    K += batch * k_stride_b + head * k_stride_h
    Lse += batch * lse_stride_b + head * lse_stride_h
    dims = tl.arange(0, PAD_DIM)
    m_offsets = tl.arange(0, TILE_M)
    n_offsets = tl.arange(0, TILE_N)
    q = _load_tile(Q, start_m, q_stride_s, q_len, m_offsets, dims, HEAD_DIM, True)
    top = tl.full([TILE_M], -1.0e30, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    whole = kv_len // TILE_N
    for step in tl.range(0, whole, num_stages=STAGES):
        scores = _tile_scores(
            q, K, step * TILE_N, k_stride_s, kv_len, n_offsets, dims, scale_log2, HEAD_DIM, False, PRECISION
        )
        top, total = _fold(scores, top, total)
    # At most one turn; as an `if` the float32 kernel spills 224 bytes.
    for start in tl.range(whole * TILE_N, kv_len, TILE_N, num_stages=1):
        scores = _tile_scores(q, K, start, k_stride_s, kv_len, n_offsets, dims, scale_log2, HEAD_DIM, True, PRECISION)
        top, total = _fold(scores, top, total)
    positions = start_m + m_offsets
    tl.store(Lse + positions, (top + tl.math.log2(total)) * 0.6931471805599453, mask=positions < q_len)


@triton.jit
def block_mass_kernel(
    Q,
    K,
    Lse,
    Mass,
    scale_log2,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    lse_stride_b,
    lse_stride_h,
    lse_stride_s,
    heads,
    q_len,
    kv_len,
    cols,
    HEAD_DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax mass of one tile of queries in every key block; grid (tiles, batch * heads).

    `Mass` is contiguous [batch * heads, tiles, cols].  Adding the tiles of a block is left to the caller, in a fixed
    order, so that the result does not depend on which program ends first.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    start_m = tl.program_id(0) * TILE_M
    Q += batch * q_stride_b + head * q_stride_h
    K += batch * k_stride_b + head * k_stride_h
    Lse += batch * lse_stride_b + head * lse_stride_h
    Mass += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * cols
    dims = tl.arange(0, PAD_DIM)
    m_offsets = tl.arange(0, TILE_M)
    n_offsets = tl.arange(0, TILE_N)
    q = _load_tile(Q, start_m, q_stride_s, q_len, m_offsets, dims, HEAD_DIM, True)
    positions = (start_m + m_offsets).to(tl.int64)
    lse = tl.load(Lse + positions * lse_stride_s, mask=positions < q_len, other=float("inf"))
    # A query without any key counts nothing, rather than infinitely much.
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)[:, None]

    STEPS: tl.constexpr = BLOCK_KV // TILE_N
    whole = kv_len // BLOCK_KV
    # One flat loop over all tiles keeps the loads in flight across blocks; each block is stored at its last tile.
    part = 0.0
    for step in tl.range(0, whole * STEPS, num_stages=STAGES):
        scores = _tile_scores(
            q, K, step * TILE_N, k_stride_s, kv_len, n_offsets, dims, scale_log2, HEAD_DIM, False, PRECISION
        )
        part = tl.where(step % STEPS == 0, 0.0, part) + tl.sum(tl.math.exp2(scores - lse))
        tl.store(Mass + step // STEPS, part, mask=step % STEPS == STEPS - 1)
    if whole < cols:
        part = 0.0
        for start in tl.range(whole * BLOCK_KV, kv_len, TILE_N, num_stages=1):
            scores = _tile_scores(
                q, K, start, k_stride_s, kv_len, n_offsets, dims, scale_log2, HEAD_DIM, True, PRECISION
            )
            part += tl.sum(tl.math.exp2(scores - lse))
        tl.store(Mass + whole, part)


@triton.jit
def block_means_kernel(
    X,
    Means,
    stride_b,
    stride_h,
    stride_s,
    heads,
    length,
    block,
    HEAD_DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean of the real tokens of one block; grid (blocks, batch * heads).

    `Means` is contiguous [batch * heads, blocks, HEAD_DIM].
    """
    index = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    X += batch * stride_b + head * stride_h
    begin = index * block
    end = tl.minimum(begin + block, length)
    dims = tl.arange(0, PAD_DIM)
    offsets = tl.arange(0, TILE)
    total = tl.zeros([PAD_DIM], tl.float32)
    for start in range(begin, end, TILE):
        total += tl.sum(_load_tile(X, start, stride_s, end, offsets, dims, HEAD_DIM, True).to(tl.float32), 0)
    Means += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + index) * HEAD_DIM
    tl.store(Means + dims, total / (end - begin).to(tl.float32), mask=dims < HEAD_DIM)


@dataclass(frozen=True)
class SearchConfig:
    """Tile sizes and launch options of the two score kernels."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int


# Tiles by (padded head dim, bytes per element); without an output to accumulate there is room for larger ones than in
# attention, on every generation.  None spills but float32 at head dim 256, there to be right rather than fast: a tile
# of queries split for three TF32 products fills the registers by itself (144 bytes per thread on sm_80).
_TILES = {
    (64, 2): SearchConfig(128, 64, 8, 2),
    (128, 2): SearchConfig(128, 64, 8, 2),
    (256, 2): SearchConfig(64, 64, 8, 2),
    (64, 4): SearchConfig(64, 32, 8, 2),
    (128, 4): SearchConfig(64, 16, 8, 1),
    (256, 4): SearchConfig(16, 16, 8, 1),
}


def search_config(itemsize: int, head_dim: int, block_q: int, block_kv: int) -> SearchConfig:
    """Picks tiles that divide the blocks; checked offline to compile without register spills.

    Args:
        itemsize: Bytes per element of q and k.
        head_dim: Head dimension before padding.
        block_q: Queries per block, a multiple of 16.
        block_kv: Keys per block, a multiple of 16.

    Returns:
        The configuration.
    """
    config = _TILES[max(64, triton.next_power_of_2(head_dim)), itemsize]
    if config.tile_m == 128 and block_q % 128:
        config = SearchConfig(64, 64, 4, 2)
    tile_m, tile_n = min(config.tile_m, block_q & -block_q), min(config.tile_n, block_kv & -block_kv)
    return SearchConfig(tile_m, tile_n, config.warps, config.stages)


def score_constants(
    config: SearchConfig, head_dim: int, float32: bool, capability: tuple[int, int] | None
) -> dict[str, int | str]:
    """The compile-time arguments that both score kernels share."""
    return {
        "HEAD_DIM": head_dim,
        "PAD_DIM": max(16, triton.next_power_of_2(head_dim)),
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        # Three TF32 products stand in for a float32 one: exact to about 1e-6, on the tensor cores.  Triton has none
        # for AMD, whose matrix cores multiply float32 themselves.
        "PRECISION": "tf32x3" if float32 and capability is not None else "ieee",
        "STAGES": config.stages,
    }


def means_constants(head_dim: int) -> dict[str, int]:
    """The compile-time arguments of the means kernel."""
    pad_dim = max(16, triton.next_power_of_2(head_dim))
    return {"HEAD_DIM": head_dim, "PAD_DIM": pad_dim, "TILE": max(16, 4096 // pad_dim)}


def triton_row_lse(q: Tensor, k: Tensor, block_q: int, block_kv: int, scale: float) -> Tensor:
    """Log-sum-exp of every query's scaled scores.

    Args:
        q: `[B, q_len, H, D]`, last stride 1, other strides free.
        k: `[B, kv_len, H, D]`, likewise.
        block_q: Queries per block, which bounds the tiles; a multiple of 16.
        block_kv: Keys per block, likewise.
        scale: Positive factor on the scores.

    Returns:
        float32 `[B, H, q_len]`, natural log.
    """
    batch, q_len, heads, head_dim = q.shape
    config = search_config(q.element_size(), head_dim, block_q, block_kv)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    _launch(
        row_lse_kernel[(-(-q_len // config.tile_m), batch * heads)],
        q.device,
        q,
        k,
        lse,
        scale * _LOG2_E,
        *_strides(q),
        *_strides(k),
        *lse.stride()[:2],
        heads,
        q_len,
        k.shape[1],
        **score_constants(config, head_dim, q.dtype == torch.float32, capability_of(q.device)),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return lse


def triton_block_mass(q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_kv: int, scale: float) -> Tensor:
    """Softmax mass of every block for a given log-sum-exp.

    Args:
        q: `[B, q_len, H, D]`, last stride 1, other strides free.
        k: `[B, kv_len, H, D]`, likewise.
        lse: float32 `[B, H, q_len]`, natural log, any strides.
        block_q: Queries per block, a multiple of 16.
        block_kv: Keys per block, likewise.
        scale: Positive factor on the scores.

    Returns:
        float32 `[B, H, ceil(q_len / block_q), ceil(kv_len / block_kv)]`.
    """
    batch, q_len, heads, head_dim = q.shape
    config = search_config(q.element_size(), head_dim, block_q, block_kv)
    rows, cols, tiles = -(-q_len // block_q), -(-k.shape[1] // block_kv), block_q // config.tile_m
    mass = torch.empty(batch, heads, rows, tiles, cols, dtype=torch.float32, device=q.device)
    _launch(
        block_mass_kernel[(rows * tiles, batch * heads)],
        q.device,
        q,
        k,
        lse,
        mass,
        scale * _LOG2_E,
        *_strides(q),
        *_strides(k),
        *lse.stride(),
        heads,
        q_len,
        k.shape[1],
        cols,
        BLOCK_KV=block_kv,
        **score_constants(config, head_dim, q.dtype == torch.float32, capability_of(q.device)),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return mass.sum(3)


def triton_block_means(x: Tensor, block: int) -> Tensor:
    """Mean of the real tokens of each block.

    Args:
        x: `[B, S, H, D]`, last stride 1, other strides free.
        block: Tokens per block.

    Returns:
        float32 `[B, H, ceil(S / block), D]`.
    """
    batch, length, heads, head_dim = x.shape
    blocks = -(-length // block)
    means = torch.empty(batch, heads, blocks, head_dim, dtype=torch.float32, device=x.device)
    kernel = block_means_kernel[(blocks, batch * heads)]
    _launch(kernel, x.device, x, means, *_strides(x), heads, length, block, **means_constants(head_dim))
    return means


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of `[B, S, H, D]` in the order batch, head, token."""
    return x.stride(0), x.stride(2), x.stride(1)


def _launch(kernel: Callable[..., Any], device: torch.device, *arguments: Any, **constants: Any) -> None:
    # A launch goes to the current GPU, which need not be the one that holds the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel(*arguments, **constants)
