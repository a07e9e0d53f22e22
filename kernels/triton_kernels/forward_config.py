"""Tile sizes and compile-time arguments of the forward kernel, by head dim and GPU generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from ..pair_tests import PairKind
from .generation import generation
from .options import DEFAULT_OPTIONS, KernelOptions


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of the forward kernel.

    Blocks that need a mask are walked in steps of `masked_tile` keys, of `tested_tile` where a pair test other than
    the band runs: masks need registers too.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    masked_tile: int = 32
    tested_tile: int = 32


# Tiles by (GPU generation, padded head dim, bytes per element); "any" is for generations without a row of their own.
# None of them spills registers under a band and a short tail but float32 at head dim 256: a tile of queries split for
# three TF32 products fills the registers by itself, and 24 bytes per thread spill on sm_80, 16 on sm_90.
_TILES = {
    ("any", 64, 2): LaunchConfig(128, 64, 8, 2),
    ("any", 128, 2): LaunchConfig(128, 64, 8, 2, tested_tile=16),
    ("any", 256, 2): LaunchConfig(64, 32, 8, 2),
    ("hopper", 64, 2): LaunchConfig(128, 64, 8, 3),
    ("hopper", 128, 2): LaunchConfig(128, 64, 8, 3),
    # Eight warps would spill 16 bytes.
    ("blackwell", 64, 2): LaunchConfig(128, 64, 4, 3, tested_tile=16),
    ("blackwell", 128, 2): LaunchConfig(128, 64, 8, 3),
    # float32 is there to be right, not fast.
    ("any", 64, 4): LaunchConfig(64, 32, 8, 2),
    ("any", 128, 4): LaunchConfig(16, 16, 4, 1),
    ("any", 256, 4): LaunchConfig(16, 16, 8, 1),
    # Matrix cores that multiply float32 themselves leave room for more.
    ("amd", 128, 4): LaunchConfig(32, 16, 4, 1),
    ("amd", 256, 4): LaunchConfig(16, 16, 4, 1),
}

# The same for plan blocks that 128 does not divide.  Four warps hold 64 rows; without the larger products of the data
# center cards they spill at 64 keys of head dim 128.
_TILES_64 = {
    ("any", 64, 2): LaunchConfig(64, 64, 4, 2),
    ("any", 128, 2): LaunchConfig(64, 32, 4, 2),
    ("hopper", 64, 2): LaunchConfig(64, 64, 4, 3),
    ("hopper", 128, 2): LaunchConfig(64, 64, 4, 3),
    ("blackwell", 64, 2): LaunchConfig(64, 64, 4, 3),
    ("blackwell", 128, 2): LaunchConfig(64, 64, 4, 3),
}


# Mean keys per step of the residual loop.
GROUP = 32


def launch_config(
    capability: tuple[int, int] | None, itemsize: int, head_dim: int, block_q: int, block_kv: int
) -> LaunchConfig:
    """Picks tiles that divide the plan's blocks; checked offline to compile without register spills.

    Args:
        capability: CUDA compute capability, or None for AMD GPUs and the interpreter.
        itemsize: Bytes per element of q, k and v.
        head_dim: Head dimension before padding.
        block_q: Queries per plan block, a multiple of 16.
        block_kv: Keys per plan block, a multiple of 16.

    Returns:
        The configuration.
    """
    tiles = _TILES | _TILES_64 if block_q % 128 else _TILES
    row = max(64, triton.next_power_of_2(head_dim)), itemsize
    config = tiles.get((generation(capability), *row)) or tiles[("any", *row)]
    tile_m = min(config.tile_m, _power_of_two_divisor(block_q))
    tile_n = min(config.tile_n, _power_of_two_divisor(block_kv))
    return replace(config, tile_m=tile_m, tile_n=tile_n)


def _power_of_two_divisor(block: int) -> int:
    return block & -block


def kernel_constants(
    config: LaunchConfig,
    *,
    head_dim: int,
    block_q: int,
    block_kv: int,
    short_tail: bool,
    predicate: int,
    precision: str,
    residual: bool = False,
    options: KernelOptions = DEFAULT_OPTIONS,
) -> dict[str, int | bool | str]:
    """The kernel's compile-time arguments."""
    return {
        "HEAD_DIM": head_dim,
        "PAD_DIM": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": block_q,
        "BLOCK_KV": block_kv,
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "MASKED_TILE_N": min(config.tile_n, config.masked_tile if light_test(predicate) else config.tested_tile),
        "SHORT_TAIL": short_tail,
        "PREDICATE": predicate,
        "RESIDUAL": residual,
        "GROUP": min(GROUP, config.tile_n),
        "PRECISION": precision,
        "STAGES": config.stages,
        "ORDERED": options.longest_first,
        "SOFTMAX": options.softmax,
    }


def light_test(predicate: int) -> bool:
    """Whether the mask of a pair test is cheap: there is none, or it is the band."""
    return predicate in (PairKind.NONE, PairKind.BAND)


def forward_precision(float32: bool, capability: tuple[int, int] | None) -> str:
    """How products are computed.

    float32 follows torch's own TF32 switch, as dense attention does.  With the switch off, three TF32 products stand
    in for one float32 product: exact to about 1e-6 and still on the tensor cores, where true float32 would spill.
    AMD's matrix cores multiply float32 themselves, and Triton has no TF32 products for them.

    Args:
        float32: Whether q, k and v are float32.
        capability: CUDA compute capability, or None for AMD GPUs and the interpreter.
    """
    if not float32 or capability is None:
        return "ieee"
    return "tf32" if _tf32_is_on() else "tf32x3"


def _tf32_is_on() -> bool:
    # Where torch has the newer switch, it says what either of them was set to; the older one raises once the newer was
    # used.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return bool(torch.backends.cuda.matmul.allow_tf32) if newer is None else newer == "tf32"
