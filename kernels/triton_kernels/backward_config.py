"""Tile sizes and compile-time arguments of the backward kernels, by head dim and GPU generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton

# Queries per program of `delta_kernel`.
DELTA_TILE = 32


@dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes and launch options of one backward kernel; `masked_tile` replaces the walked side under a mask."""

    tile_m: int
    tile_n: int
    masked_tile: int
    warps: int
    stages: int


def backward_config(
    kernel: str, capability: tuple[int, int] | None, itemsize: int, head_dim: int, block_q: int, block_kv: int
) -> BackwardConfig:
    """Picks tiles that divide the plan's blocks.

    16-bit ones up to head dim 128 are checked offline to compile without register spills.

    Args:
        kernel: "dq" or "dkv".
        capability: CUDA compute capability, or None for other hardware.
        itemsize: Bytes per element of q, k and v.
        head_dim: Head dimension before padding.
        block_q: Queries per plan block, a multiple of 16.
        block_kv: Keys per plan block, a multiple of 16.

    Returns:
        The configuration.
    """
    pad_dim = max(64, triton.next_power_of_2(head_dim))
    major = 0 if capability is None else capability[0]
    if itemsize == 4:
        # float32 is there to be right, not fast.
        tiles = _Tiles(32, 32, 32, 4, 1) if pad_dim == 64 else _Tiles(16, 16, 16, 4, 1)
    elif pad_dim > 128:
        tiles = _Tiles(64, 16, 16, 8, 1)
    else:
        tiles = _sixteen_bit(kernel, major, pad_dim, block_q if kernel == "dq" else block_kv)
    sides = (tiles.owned, tiles.walked) if kernel == "dq" else (tiles.walked, tiles.owned)
    tile_m, tile_n = min(sides[0], block_q & -block_q), min(sides[1], block_kv & -block_kv)
    masked = min(tiles.masked, tile_n if kernel == "dq" else tile_m)
    return BackwardConfig(tile_m, tile_n, masked, tiles.warps, tiles.stages)


class _Tiles(NamedTuple):
    """`owned` rows stay in registers while `walked` ones (`masked` ones under a mask) pass by."""

    owned: int
    walked: int
    masked: int
    warps: int
    stages: int


def _sixteen_bit(kernel: str, major: int, pad_dim: int, block: int) -> _Tiles:
    owned = 64 if block % 128 else 128
    roomy = major == 10 or (major == 9 and kernel == "dq")
    if pad_dim <= 64 or roomy:
        return _Tiles(owned, 64, 32, owned // 16, 2)
    # dK and dV are two accumulators: with 128 keys only Hopper holds them, and only beside narrow steps.
    if owned == 128 and kernel == "dkv" and major == 9:
        return _Tiles(128, 32, 32, 8, 2)
    if owned == 128 and kernel == "dq":
        return _Tiles(128, 32, 16, 8, 2)
    return _Tiles(64, 64, 32, 8, 2)


def backward_constants(
    config: BackwardConfig,
    *,
    head_dim: int,
    block_q: int,
    block_kv: int,
    short_tail: bool,
    banded: bool,
    precision: str,
) -> dict[str, int | bool | str]:
    """The compile-time arguments of `dq_kernel` and `dkv_kernel`."""
    return {
        "HEAD_DIM": head_dim,
        "PAD_DIM": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": block_q,
        "BLOCK_KV": block_kv,
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "MASKED_TILE": config.masked_tile,
        "SHORT_TAIL": short_tail,
        "BANDED": banded,
        "PRECISION": precision,
        "STAGES": config.stages,
    }


def delta_constants(head_dim: int) -> dict[str, int]:
    """The compile-time arguments of `delta_kernel`."""
    return {"HEAD_DIM": head_dim, "PAD_DIM": triton.next_power_of_2(head_dim), "TILE_M": DELTA_TILE}
