"""Compiles the Hopper kernels without a GPU, and finds out whether they really are warp-specialized.

Triton drops the specialization of a loop it cannot partition without saying so, and the kernel then runs with all its
warps waiting for each other.  So the flag proves nothing: the partitions must be in the compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .hopper import hopper_config, hopper_constants, launch_options
from .offline import KernelReport, _argument_type, _is_aligned, _report


@dataclass(frozen=True)
class VariantReport:
    """Resources of a compiled Hopper kernel.

    Attributes:
        resources: Registers, spills, shared memory and machine code.
        warps: Warps per program, those of all partitions.
        partitioned: Whether the compiler's intermediate program has partitions of warps.
    """

    resources: KernelReport
    warps: int
    partitioned: bool

    @property
    def specialized(self) -> bool:
        """Whether warps play different parts and hand each other registers."""
        return self.partitioned and self.resources.uses("USETMAXREG")


def compile_tma(
    *, dtype: str = "bf16", head_dim: int = 128, block_kv: int = 128, short_tail: bool = False
) -> VariantReport:
    """Compiles the tma variant exactly as a launch on sm_90 would.

    Args:
        dtype: "fp16" or "bf16".
        head_dim: Head dimension, up to 128.
        block_kv: Keys per plan block.
        short_tail: Whether the last key block is short.

    Returns:
        The report.

    Raises:
        RuntimeError: Triton brings no cuobjdump, or TRITON_INTERPRET is set.
    """
    from .tma import tma_kernel

    return _compile(ASTSource, tma_kernel, dtype, head_dim, block_kv, short_tail)


def compile_gluon(
    *, dtype: str = "bf16", head_dim: int = 128, block_kv: int = 128, short_tail: bool = False
) -> VariantReport:
    """Compiles the gluon variant exactly as a launch on sm_90 would; arguments as in `compile_tma`.

    Raises:
        RuntimeError: Triton brings no cuobjdump, or TRITON_INTERPRET is set.
        ImportError: This Triton's Gluon lacks what the kernel needs.
    """
    from triton.experimental.gluon._runtime import GluonASTSource

    from .gluon_kernel import gluon_kernel

    return _compile(GluonASTSource, gluon_kernel, dtype, head_dim, block_kv, short_tail)


def _compile(
    source_type: Any, kernel: Any, dtype: str, head_dim: int, block_kv: int, short_tail: bool
) -> VariantReport:
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Kernels are interpreted, so there is nothing to compile. Unset TRITON_INTERPRET.")
    config = hopper_config(head_dim, block_kv)
    constants = hopper_constants(head_dim, config.tile_m, block_kv, short_tail)
    names = kernel.arg_names
    signature = {name: _argument_type(name, dtype, constants) for name in names}
    # What a launch would find: aligned pointers and strides that are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if _is_aligned(name, signature)}
    source = source_type(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch_options(config))
    partitioned = "ttg.warp_specialize(" in compiled.asm["ttgir"]
    return VariantReport(_report(compiled), compiled.metadata.num_warps, partitioned)
