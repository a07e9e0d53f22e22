"""Tile sizes and compile-time arguments of the backward kernels, by head dim and GPU generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton

from .forward_config import light_test
from .generation import generation

# Queries per program of `delta_kernel`.
DELTA_TILE = 32


@dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes and launch options of one backward kernel.

    `masked_tile` replaces the walked side under a mask, `tested_tile` where a pair test other than the band runs.
    """

    tile_m: int
    tile_n: int
    masked_tile: int
    warps: int
    stages: int
    tested_tile: int


class _Tiles(NamedTuple):
    """`owned` rows stay in registers while `walked` ones (`masked` or `tested` ones under a mask) pass by."""

    owned: int
    walked: int
    masked: int
    warps: int
    stages: int
    tested: int = 32


# Tiles by (GPU generation, kernel, padded head dim, bytes per element); "any" is for generations without a row of
# their own.  Under a band and a short tail the 16-bit ones spill no registers at head dims 64 and 128, and 8 bytes per
# thread at two others (dK and dV, 40 on sm_90; dQ, 256 on sm_100).  In float32 the owned tile split for three TF32
# products fills the registers by itself: dQ spills 8, 24 and 32 bytes at head dim 128 on sm_90, sm_89 and sm_120, at
# 256 112 on sm_80, where dK and dV spill 288.
_TILES = {
    ("any", "dq", 64, 2): _Tiles(128, 64, 32, 8, 2),
    ("any", "dq", 128, 2): _Tiles(128, 32, 16, 8, 2),
    ("any", "dq", 256, 2): _Tiles(32, 32, 16, 8, 1),
    ("hopper", "dq", 128, 2): _Tiles(128, 64, 32, 8, 2),
    ("blackwell", "dq", 128, 2): _Tiles(128, 64, 32, 8, 2),
    ("any", "dkv", 64, 2): _Tiles(128, 64, 32, 8, 2),
    # dK and dV are two accumulators: beside 128 keys of head dim 128 there is room for narrow steps at most.
    ("any", "dkv", 128, 2): _Tiles(64, 64, 32, 8, 2),
    ("any", "dkv", 256, 2): _Tiles(32, 32, 16, 8, 1),
    ("ada", "dkv", 64, 2): _Tiles(128, 32, 32, 8, 2),
    ("geforce-blackwell", "dkv", 64, 2): _Tiles(128, 32, 32, 8, 2),
    ("hopper", "dkv", 128, 2): _Tiles(128, 32, 32, 8, 2, tested=16),
    ("blackwell", "dkv", 128, 2): _Tiles(128, 64, 32, 8, 2, tested=16),
    ("amd", "dq", 256, 2): _Tiles(64, 16, 16, 8, 1),
    ("amd", "dkv", 256, 2): _Tiles(64, 16, 16, 8, 1),
    # With four warps a thread of an AMD GPU has 512 registers, with eight only 256.
    ("amd", "dkv", 64, 2): _Tiles(64, 64, 32, 4, 1),
    ("amd", "dkv", 128, 2): _Tiles(64, 64, 32, 4, 1, tested=16),
    # float32 is there to be right, not fast.
    ("any", "dq", 64, 4): _Tiles(32, 32, 32, 4, 1),
    ("any", "dq", 128, 4): _Tiles(16, 16, 16, 4, 1),
    ("any", "dq", 256, 4): _Tiles(16, 16, 16, 8, 1),
    ("any", "dkv", 64, 4): _Tiles(32, 32, 32, 8, 1),
    ("any", "dkv", 128, 4): _Tiles(16, 16, 16, 8, 1),
    ("any", "dkv", 256, 4): _Tiles(16, 16, 16, 8, 1),
    ("amd", "dq", 256, 4): _Tiles(16, 16, 16, 4, 1),
    ("amd", "dkv", 64, 4): _Tiles(32, 32, 32, 4, 1),
    ("amd", "dkv", 128, 4): _Tiles(16, 16, 16, 4, 1),
    ("amd", "dkv", 256, 4): _Tiles(16, 16, 16, 4, 1),
}

# The same for plan blocks that 128 does not divide.
_TILES_64 = {
    ("any", "dq", 64, 2): _Tiles(64, 64, 32, 4, 2),
    ("any", "dq", 128, 2): _Tiles(64, 64, 32, 8, 2),
    ("hopper", "dq", 128, 2): _Tiles(64, 64, 32, 4, 2),
    ("blackwell", "dq", 128, 2): _Tiles(64, 64, 32, 4, 2),
    ("any", "dkv", 64, 2): _Tiles(64, 64, 32, 4, 2),
    ("ada", "dkv", 64, 2): _Tiles(64, 64, 32, 4, 2),
    ("geforce-blackwell", "dkv", 64, 2): _Tiles(64, 64, 32, 4, 2),
    ("hopper", "dkv", 128, 2): _Tiles(64, 64, 32, 8, 2),
    ("blackwell", "dkv", 128, 2): _Tiles(64, 64, 32, 4, 2),
}


def backward_config(
    kernel: str, capability: tuple[int, int] | None, itemsize: int, head_dim: int, block_q: int, block_kv: int
) -> BackwardConfig:
    """Picks tiles that divide the plan's blocks; checked offline to compile without register spills.

    Args:
        kernel: "dq" or "dkv".
        capability: CUDA compute capability, or None for AMD GPUs and the interpreter.
        itemsize: Bytes per element of q, k and v.
        head_dim: Head dimension before padding.
        block_q: Queries per plan block, a multiple of 16.
        block_kv: Keys per plan block, a multiple of 16.

    Returns:
        The configuration.
    """
    tiles = _TILES | _TILES_64 if (block_q if kernel == "dq" else block_kv) % 128 else _TILES
    row = kernel, max(64, triton.next_power_of_2(head_dim)), itemsize
    found = tiles.get((generation(capability), *row)) or tiles[("any", *row)]
    sides = (found.owned, found.walked) if kernel == "dq" else (found.walked, found.owned)
    tile_m, tile_n = min(sides[0], block_q & -block_q), min(sides[1], block_kv & -block_kv)
    masked = min(found.masked, tile_n if kernel == "dq" else tile_m)
    return BackwardConfig(tile_m, tile_n, masked, found.warps, found.stages, min(masked, found.tested))


def backward_constants(
    config: BackwardConfig,
    *,
    head_dim: int,
    block_q: int,
    block_kv: int,
    short_tail: bool,
    predicate: int,
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
        "MASKED_TILE": config.masked_tile if light_test(predicate) else config.tested_tile,
        "SHORT_TAIL": short_tail,
        "PREDICATE": predicate,
        "PRECISION": precision,
        "STAGES": config.stages,
    }


def delta_constants(head_dim: int) -> dict[str, int]:
    """The compile-time arguments of `delta_kernel`."""
    return {"HEAD_DIM": head_dim, "PAD_DIM": triton.next_power_of_2(head_dim), "TILE_M": DELTA_TILE}
