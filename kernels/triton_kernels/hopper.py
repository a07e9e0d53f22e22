"""What the two Hopper kernels have in common: tiles, compile-time arguments, and how they are launched."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ..sparse_plan import SparsePlan
from .forward_config import LaunchConfig

# The compiler splits a tile of this many queries over two consumer warpgroups of 64 rows.
TILE_M = 128

_LOG2_E = 1.4426950408889634
_MIN_PAD_DIM = 64
# Stages by padded head dim and tile of keys; the tests compile each for spills.
_STAGES = {(64, 64): 4, (64, 128): 3, (128, 64): 3, (128, 128): 2}


def hopper_config(head_dim: int, block_kv: int) -> LaunchConfig:
    """Picks the tile: 128 queries by 128 keys, or by 64 where the plan's blocks ask for it.

    Args:
        head_dim: Head dimension before padding, up to 128.
        block_kv: Keys per plan block, a multiple of 64.

    Returns:
        The configuration.
    """
    tile_n = 64 if block_kv % 128 else 128
    return LaunchConfig(TILE_M, tile_n, 4, _STAGES[_pad_dim(head_dim), tile_n])


def hopper_constants(head_dim: int, block_q: int, block_kv: int, short_tail: bool) -> dict[str, Any]:
    """The kernels' compile-time arguments."""
    config = hopper_config(head_dim, block_kv)
    return {
        "HEAD_DIM": head_dim,
        "PAD_DIM": _pad_dim(head_dim),
        "BLOCK_Q": block_q,
        "BLOCK_KV": block_kv,
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "SHORT_TAIL": short_tail,
        "STAGES": config.stages,
    }


def launch_options(config: LaunchConfig) -> dict[str, Any]:
    """How the kernels are compiled; the compiler's default for fused multiply-adds is about to change."""
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


def _pad_dim(head_dim: int) -> int:
    return max(_MIN_PAD_DIM, int(triton.next_power_of_2(head_dim)))


def launch_hopper(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Launches `tma_kernel` or `gluon_kernel` on the current device.

    Args:
        kernel: The kernel.
        q: `[B, H, q_len, D]`; last stride 1, base and other strides multiples of 16 bytes.
        k: `[B, H, kv_len, D]`, likewise.
        v: `[B, H, kv_len, D]`, likewise.
        plan: Who attends to whom, every listed block FULL; block_q is a multiple of 128 and block_kv of 64.
        scale: Positive factor on the scores.
        out: Written; like q, last stride 1.
        lse: Written; float32 `[B, H, q_len]`, contiguous, natural log.
    """
    batch, heads, q_len, head_dim = q.shape
    indices = plan.indices.contiguous().expand(batch, heads, -1, -1)
    counts = plan.counts.contiguous().expand(batch, heads, -1)
    config = hopper_config(head_dim, plan.block_kv)
    constants = hopper_constants(head_dim, plan.block_q, plan.block_kv, plan.kv_len % plan.block_kv != 0)
    launch = kernel[(plan.num_q_blocks * (plan.block_q // config.tile_m), batch * heads)]
    with_workspace(
        lambda: launch(
            q,
            k,
            v,
            out,
            lse,
            indices,
            counts,
            scale * _LOG2_E,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *indices.stride()[:3],
            *counts.stride()[:2],
            heads,
            q_len,
            plan.kv_len,
            **constants,
            **launch_options(config),
        )
    )


def with_workspace(launch: Callable[[], object]) -> None:
    """Runs a launch whose kernel makes descriptors, for which Triton asks an allocator for memory.

    Triton's allocator is a context variable: a worker thread does not inherit it, so it is set for every launch, and
    in a context of its own, so that the caller's allocator stays.
    """
    contextvars.copy_context().run(_set_and_launch, launch)


def _set_and_launch(launch: Callable[[], object]) -> None:
    triton.set_allocator(_allocate)
    launch()


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    # torch hands out blocks aligned to 512 bytes, more than any descriptor asks for, on the current device and stream.
    return torch.empty(size, dtype=torch.int8, device="cuda")
