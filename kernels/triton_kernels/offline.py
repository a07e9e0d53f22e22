"""Compiles the kernels for a GPU that is not there, and reads registers and spills off the result.

Triton needs no driver to compile.  A kernel that spills registers to memory runs at a fraction of its speed, so the
tests check every shipped configuration here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .backward import delta_kernel, dkv_kernel, dq_kernel
from .backward_config import backward_config, backward_constants, delta_constants
from .forward import forward_kernel
from .forward_config import forward_precision, kernel_constants, launch_config

_ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
_FLOAT_POINTERS = ("Lse", "Delta", "GradLse")
_INT_POINTERS = ("Indices", "Counts", "FullCounts", "Widths", "Rows", "Bounds")
_FLOATS = ("scale", "scale_log2")
_WARP_SIZE = 32


@dataclass(frozen=True)
class KernelReport:
    """Resources of one compiled kernel.

    Attributes:
        registers: Registers per thread.
        spill_bytes: Stack bytes per thread; anything above 0 is a spill.
        shared_bytes: Shared memory per program.
        instructions: Machine code, one line per instruction.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: str

    def uses(self, opcode: str) -> bool:
        """Tells whether an instruction such as "HGMMA" occurs."""
        return re.search(rf"\b{re.escape(opcode)}\b", self.instructions) is not None


def compile_forward(
    capability: tuple[int, int],
    *,
    dtype: str = "bf16",
    head_dim: int = 128,
    block_q: int = 128,
    block_kv: int = 128,
    short_tail: bool = False,
    banded: bool = False,
) -> KernelReport:
    """Compiles the kernel exactly as a launch on that GPU would.

    Args:
        capability: CUDA compute capability, such as (9, 0).
        dtype: "fp16", "bf16" or "fp32".
        head_dim: Head dimension.
        block_q: Queries per plan block.
        block_kv: Keys per plan block.
        short_tail: Whether the last key block is short.
        banded: Whether the plan has PARTIAL blocks.

    Returns:
        The resource report.

    Raises:
        RuntimeError: Triton brings no cuobjdump, or TRITON_INTERPRET is set.
    """
    config = launch_config(capability, _ITEMSIZE[dtype], head_dim, block_q, block_kv)
    constants = kernel_constants(
        config,
        head_dim=head_dim,
        block_q=block_q,
        block_kv=block_kv,
        short_tail=short_tail,
        banded=banded,
        precision=forward_precision(dtype == "fp32"),
    )
    return _compile(forward_kernel, capability, dtype, constants, config.warps, config.stages)


def compile_backward(
    kernel: str,
    capability: tuple[int, int],
    *,
    dtype: str = "bf16",
    head_dim: int = 128,
    block_q: int = 128,
    block_kv: int = 128,
    short_tail: bool = False,
    banded: bool = False,
) -> KernelReport:
    """Compiles a backward kernel exactly as a launch on that GPU would.

    Args:
        kernel: "dq", "dkv", or "delta", which ignores all that follows but dtype and head_dim.
        capability: CUDA compute capability, such as (9, 0).
        dtype: "fp16", "bf16" or "fp32".
        head_dim: Head dimension.
        block_q: Queries per plan block.
        block_kv: Keys per plan block.
        short_tail: Whether the last block on the walked side (keys for "dq", queries for "dkv") is short.
        banded: Whether the plan has PARTIAL blocks.

    Returns:
        The resource report.

    Raises:
        RuntimeError: Triton brings no cuobjdump, or TRITON_INTERPRET is set.
    """
    if kernel == "delta":
        return _compile(delta_kernel, capability, dtype, delta_constants(head_dim), 4, 1)
    config = backward_config(kernel, capability, _ITEMSIZE[dtype], head_dim, block_q, block_kv)
    constants = backward_constants(
        config,
        head_dim=head_dim,
        block_q=block_q,
        block_kv=block_kv,
        short_tail=short_tail,
        banded=banded,
        precision=forward_precision(dtype == "fp32"),
    )
    function = {"dq": dq_kernel, "dkv": dkv_kernel}[kernel]
    return _compile(function, capability, dtype, constants, config.warps, config.stages)


def _compile(
    kernel: Any, capability: tuple[int, int], dtype: str, constants: dict[str, Any], warps: int, stages: int
) -> KernelReport:
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Kernels are interpreted, so there is nothing to compile. Unset TRITON_INTERPRET.")
    names = kernel.arg_names
    signature = {name: _argument_type(name, dtype, constants) for name in names}
    # What a launch would find: aligned pointers and strides that are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if _is_aligned(name, signature)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], _WARP_SIZE)
    return _report(triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages}))


def _argument_type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in _FLOAT_POINTERS:
        return "*fp32"
    if name in _INT_POINTERS:
        return "*i32"
    if name in _FLOATS:
        return "fp32"
    # All other pointers are capitalised and hold the tensors of the call.
    return f"*{dtype}" if name[0].isupper() else "i32"


def _is_aligned(name: str, signature: dict[str, str]) -> bool:
    return signature[name].startswith("*") or bool(re.match(r"(q|k|v|out|grad)_stride", name))


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


def _run(tool: Path, option: str, cubin: Path) -> str:
    return subprocess.run([str(tool), option, str(cubin)], capture_output=True, text=True, check=True).stdout
