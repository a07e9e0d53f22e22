"""Compiles the search kernels for a GPU that is not there, as `triton_kernels.offline` does for attention."""

from __future__ import annotations

from typing import Any

from ..triton_kernels.offline import ITEMSIZE, KernelReport, compile_kernel
from . import kernels

SEARCH_KERNELS = ("row_lse", "block_mass", "block_means")


def compile_search(
    kernel: str,
    capability: tuple[int, int] | None,
    *,
    dtype: str = "bf16",
    head_dim: int = 128,
    block_q: int = 128,
    block_kv: int = 128,
) -> KernelReport:
    """Compiles a search kernel exactly as a launch on that GPU would.

    Args:
        kernel: One of `SEARCH_KERNELS`.
        capability: CUDA compute capability, such as (9, 0), or None for AMD's gfx942.
        dtype: "fp16", "bf16" or "fp32".
        head_dim: Head dimension.
        block_q: Queries per block.
        block_kv: Keys per block.

    Returns:
        The resource report.

    Raises:
        RuntimeError: Triton brings no cuobjdump, or TRITON_INTERPRET is set.
        ValueError: Unknown kernel.
    """
    if kernel not in SEARCH_KERNELS:
        raise ValueError(f"Unknown search kernel {kernel!r}. Choose one of {', '.join(SEARCH_KERNELS)}.")
    function = getattr(kernels, f"{kernel}_kernel")
    constants: dict[str, Any]
    if kernel == "block_means":
        constants = dict(kernels.means_constants(head_dim))
        # Triton's own defaults, which the launch leaves alone; the kernel has no loop to pipeline.
        return compile_kernel(function, capability, dtype, constants, warps=4, stages=2)
    config = kernels.search_config(ITEMSIZE[dtype], head_dim, block_q, block_kv)
    constants = dict(kernels.score_constants(config, head_dim, dtype == "fp32", capability))
    if kernel == "block_mass":
        constants["BLOCK_KV"] = block_kv
    return compile_kernel(function, capability, dtype, constants, config.warps, config.stages)
