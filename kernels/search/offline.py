"""Compiles the search kernels for a GPU that is not there, as `triton_kernels.offline` does for attention."""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..triton_kernels.offline import KernelReport, _report
from . import kernels

SEARCH_KERNELS = ("row_lse", "block_mass", "block_means")

_ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}


def compile_search(
    kernel: str,
    capability: tuple[int, int],
    *,
    dtype: str = "bf16",
    head_dim: int = 128,
    block_q: int = 128,
    block_kv: int = 128,
) -> KernelReport:
    """Compiles a search kernel exactly as a launch on that GPU would.

    Args:
        kernel: One of `SEARCH_KERNELS`.
        capability: CUDA compute capability, such as (9, 0).
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
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("Kernels are interpreted, so there is nothing to compile. Unset TRITON_INTERPRET.")
    constants: dict[str, Any]
    if kernel == "block_means":
        constants, options = dict(kernels.means_constants(head_dim)), {}
    else:
        config = kernels.search_config(_ITEMSIZE[dtype], head_dim, block_q, block_kv)
        constants = dict(kernels.score_constants(config, head_dim, dtype == "fp32"))
        options = {"num_warps": config.warps, "num_stages": config.stages}
    if kernel == "block_mass":
        constants["BLOCK_KV"] = block_kv
    names = function.arg_names
    signature = {name: _argument_type(name, dtype, constants) for name in names}
    # What a launch would find: aligned pointers, and token strides that are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if _is_aligned(name, signature)}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return _report(triton.compile(source, target=target, options=options))


def _argument_type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("Q", "K", "X"):
        return f"*{dtype}"
    return "*fp32" if name in ("Lse", "Mass", "Means") else "fp32" if name == "scale_log2" else "i32"


def _is_aligned(name: str, signature: dict[str, str]) -> bool:
    return signature[name].startswith("*") or bool(re.fullmatch(r"([qk]_)?stride_[bhs]", name))
