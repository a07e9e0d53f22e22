"""Compiles the kernels for a GPU that is not there, and reads registers and spills off the result.

Triton needs no driver to compile, and no ROCm either.  A kernel that spills registers to memory runs at a fraction of
its speed, so the tests check every shipped configuration here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .backward_config import backward_config, backward_constants, delta_constants
from .backward_kernels import delta_kernel, dkv_kernel, dq_kernel
from .forward import forward_kernel
from .forward_config import forward_precision, kernel_constants, launch_config
from .options import DEFAULT_OPTIONS, KernelOptions

# What the tests compile for: GPU name -> CUDA compute capability, None for AMD.
TARGETS: dict[str, tuple[int, int] | None] = {
    "sm_80": (8, 0),
    "sm_89": (8, 9),
    "sm_90": (9, 0),
    "sm_100": (10, 0),
    "sm_120": (12, 0),
    "gfx942": None,
}

# Bytes per element, by Triton's names of the dtypes.
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
_FLOAT_POINTERS = ("KeyNorms", "Lse", "Delta", "GradLse", "LogSizes", "Mass", "Means")
_BYTE_POINTERS = ("Listed",)
_INT_POINTERS = ("Indices", "Counts", "FullCounts", "Order", "Table", "Lookup", "Rows", "Bounds")
_FLOATS = ("scale", "scale_log2")


@dataclass(frozen=True)
class KernelReport:
    """Resources of one compiled kernel.

    Attributes:
        registers: Registers per thread; on AMD the vector registers, accumulation registers included.
        spill_bytes: Stack bytes per thread; anything above 0 is a spill.
        shared_bytes: Shared memory per program.
        instructions: Machine code, one line per instruction.
        scalar_spills: On AMD, scalar registers that were moved to lanes of vector registers, which costs little.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: str
    scalar_spills: int = 0

    def uses(self, opcode: str) -> bool:
        """Tells whether an instruction such as "HGMMA" occurs."""
        return re.search(rf"\b{re.escape(opcode)}\b", self.instructions) is not None


def compile_forward(
    capability: tuple[int, int] | None,
    *,
    dtype: str = "bf16",
    head_dim: int = 128,
    block_q: int = 128,
    block_kv: int = 128,
    short_tail: bool = False,
    predicate: int = 0,
    residual: bool = False,
    options: KernelOptions = DEFAULT_OPTIONS,
) -> KernelReport:
    """Compiles the kernel exactly as a launch on that GPU would.

    Args:
        capability: CUDA compute capability, such as (9, 0), or None for AMD's gfx942.
        dtype: "fp16", "bf16" or "fp32".
        head_dim: Head dimension.
        block_q: Queries per plan block.
        block_kv: Keys per plan block.
        short_tail: Whether the last key block is short.
        predicate: The `PairKind` of the plan; 0 without PARTIAL blocks.
        residual: Whether blocks that are not listed contribute their means.
        options: Scheduling and softmax.

    Returns:
        The resource report.

    Raises:
        RuntimeError: Triton brings no cuobjdump, or TRITON_INTERPRET is set.
    """
    config = launch_config(capability, ITEMSIZE[dtype], head_dim, block_q, block_kv)
    constants = kernel_constants(
        config,
        head_dim=head_dim,
        block_q=block_q,
        block_kv=block_kv,
        short_tail=short_tail,
        predicate=predicate,
        residual=residual,
        options=options,
        precision=forward_precision(dtype == "fp32", capability),
    )
    return compile_kernel(forward_kernel, capability, dtype, constants, config.warps, config.stages)


def compile_backward(
    kernel: str,
    capability: tuple[int, int] | None,
    *,
    dtype: str = "bf16",
    head_dim: int = 128,
    block_q: int = 128,
    block_kv: int = 128,
    short_tail: bool = False,
    predicate: int = 0,
) -> KernelReport:
    """Compiles a backward kernel exactly as a launch on that GPU would.

    Args:
        kernel: "dq", "dkv", or "delta", which ignores all that follows but dtype and head_dim.
        capability: CUDA compute capability, such as (9, 0), or None for AMD's gfx942.
        dtype: "fp16", "bf16" or "fp32".
        head_dim: Head dimension.
        block_q: Queries per plan block.
        block_kv: Keys per plan block.
        short_tail: Whether the last block on the walked side (keys for "dq", queries for "dkv") is short.
        predicate: The `PairKind` of the plan; 0 without PARTIAL blocks.

    Returns:
        The resource report.

    Raises:
        RuntimeError: Triton brings no cuobjdump, or TRITON_INTERPRET is set.
    """
    if kernel == "delta":
        return compile_kernel(delta_kernel, capability, dtype, delta_constants(head_dim), 4, 1)
    config = backward_config(kernel, capability, ITEMSIZE[dtype], head_dim, block_q, block_kv)
    constants = backward_constants(
        config,
        head_dim=head_dim,
        block_q=block_q,
        block_kv=block_kv,
        short_tail=short_tail,
        predicate=predicate,
        precision=forward_precision(dtype == "fp32", capability),
    )
    function = {"dq": dq_kernel, "dkv": dkv_kernel}[kernel]
    return compile_kernel(function, capability, dtype, constants, config.warps, config.stages)


def compile_kernel(
    kernel: Any,
    capability: tuple[int, int] | None,
    dtype: str,
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
) -> KernelReport:
    """Compiles any kernel whose argument names follow those of the attention kernels.

    Args:
        kernel: The Triton function.
        capability: CUDA compute capability, or None for AMD's gfx942.
        dtype: "fp16", "bf16" or "fp32", of the tensors of the call.
        constants: Its compile-time arguments.
        warps: Warps per program.
        stages: Loads in flight.

    Returns:
        The resource report.

    Raises:
        RuntimeError: Triton brings no cuobjdump, or TRITON_INTERPRET is set.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Kernels are interpreted, so there is nothing to compile. Unset TRITON_INTERPRET.")
    names = kernel.arg_names
    signature = {name: _argument_type(name, dtype, constants) for name in names}
    # What a launch would find: aligned pointers and strides that are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if _is_aligned(name, signature)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    target = GPUTarget("hip", "gfx942", 64)
    if capability is not None:
        target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    return _amd_report(compiled) if capability is None else _report(compiled)


def _argument_type(name: str, dtype: str, constants: Mapping[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in _FLOAT_POINTERS:
        return "*fp32"
    if name in _INT_POINTERS:
        return "*i32"
    if name in _BYTE_POINTERS:
        return "*u8"
    if name in _FLOATS:
        return "fp32"
    # All other pointers are capitalised and hold the tensors of the call.
    return f"*{dtype}" if name[0].isupper() else "i32"


def _is_aligned(name: str, signature: dict[str, str]) -> bool:
    return signature[name].startswith("*") or bool(re.match(r"((q|k|v|out|grad)_)?stride_[bhs]", name))


def _report(kernel: Any) -> KernelReport:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise RuntimeError(f"{tool} is missing. Install the triton wheel from PyPI, which brings it along.")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run(tool, "--dump-resource-usage", cubin)
        code = _run(tool, "--dump-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    return KernelReport(int(found[1]), int(found[2]), kernel.metadata.shared, code)


def _amd_report(kernel: Any) -> KernelReport:
    code = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"The assembly for AMD does not say {name}. Install Triton 3.6 or newer.")
        return int(found[1])

    stack, scalar_spills = number("private_segment_fixed_size"), number("sgpr_spill_count")
    # Spilled vector registers lie on the stack; both must be 0, should either be counted in another way one day.
    spill_bytes = max(stack, 4 * number("vgpr_spill_count"))
    return KernelReport(number("vgpr_count"), spill_bytes, kernel.metadata.shared, code, scalar_spills)


def _run(tool: Path, option: str, cubin: Path) -> str:
    return subprocess.run([str(tool), option, str(cubin)], capture_output=True, text=True, check=True).stdout
