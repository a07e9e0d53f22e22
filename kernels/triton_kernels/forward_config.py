"""Tile sizes and compile-time arguments of the forward kernel, by head dim and GPU generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of the forward kernel."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int


# By padded head dim.  float32 is there to be right, not fast: above 64 it spills a few registers.
_FLOAT32 = {64: LaunchConfig(64, 32, 8, 2), 128: LaunchConfig(32, 16, 4, 1), 256: LaunchConfig(16, 16, 4, 1)}


def launch_config(
    capability: tuple[int, int] | None, itemsize: int, head_dim: int, block_q: int, block_kv: int
) -> LaunchConfig:
    """Picks tiles that divide the plan's blocks; 16-bit ones are checked offline to compile without register spills.

    Args:
        capability: CUDA compute capability, or None for other hardware.
        itemsize: Bytes per element of q, k and v.
        head_dim: Head dimension before padding.
        block_q: Queries per plan block, a multiple of 16.
        block_kv: Keys per plan block, a multiple of 16.

    Returns:
        The configuration.
    """
    pad_dim = max(16, triton.next_power_of_2(head_dim))
    if itemsize == 4:
        config = _FLOAT32[max(64, pad_dim)]
    elif pad_dim > 128:
        config = LaunchConfig(64, 32, 8, 2)
    else:
        config = _sixteen_bit(0 if capability is None else capability[0], pad_dim, block_q)
    tile_m = min(config.tile_m, _power_of_two_divisor(block_q))
    tile_n = min(config.tile_n, _power_of_two_divisor(block_kv))
    return LaunchConfig(tile_m, tile_n, config.warps, config.stages)


def _sixteen_bit(major: int, pad_dim: int, block_q: int) -> LaunchConfig:
    datacentre = major in (9, 10)
    stages = 3 if major >= 9 else 2
    if block_q % 128:
        # Four warps hold 64 rows; without Hopper's larger products they spill at 64 keys.
        return LaunchConfig(64, 64 if datacentre or pad_dim <= 64 else 32, 4, stages)
    # Data-centre Blackwell spills 16 bytes at head dim 64 with eight warps.
    return LaunchConfig(128, 64, 4 if major == 10 and pad_dim <= 64 else 8, stages)


def _power_of_two_divisor(block: int) -> int:
    return block & -block


def kernel_constants(
    config: LaunchConfig, *, head_dim: int, block_q: int, block_kv: int, short_tail: bool, banded: bool, precision: str
) -> dict[str, int | bool | str]:
    """The kernel's compile-time arguments."""
    return {
        "HEAD_DIM": head_dim,
        "PAD_DIM": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": block_q,
        "BLOCK_KV": block_kv,
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "MASKED_TILE_N": min(32, config.tile_n),
        "SHORT_TAIL": short_tail,
        "BANDED": banded,
        "PRECISION": precision,
        "STAGES": config.stages,
    }


def forward_precision(float32: bool) -> str:
    """How products are computed.

    float32 follows torch's own TF32 switch, as dense attention does.  With the switch off, three TF32 products stand
    in for one float32 product: exact to about 1e-6 and still on the tensor cores, where true float32 would spill.
    """
    if not float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
