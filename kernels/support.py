"""Which backend can run a call, and why not.  One set of checks serves reports, errors and the automatic choice."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from .triton_kernels.variants import VARIANTS, backend_name, check_variant, choose_variant, fits_descriptors

BACKENDS = ("triton", "gather", "reference", "flex", "xformers")
# What `attend(backend=...)` takes beside "auto": the backends, and single variants of the Triton kernel.
NAMES = (*BACKENDS, *(backend_name(variant) for variant in VARIANTS))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MAX_HEAD_DIM = 256
_MIN_TILE = 16


@dataclass(frozen=True)
class Support:
    """Whether a backend takes a call.

    Attributes:
        backend: One of `NAMES`.
        ok: True if it runs the call.
        reason: What makes it fit, or what stands in the way and what to do.
        variant: Variant of the Triton kernel that runs it; empty for other backends.
    """

    backend: str
    ok: bool
    reason: str
    variant: str = ""

    @property
    def family(self) -> str:
        """The backend without its variant, one of `BACKENDS`."""
        return self.backend.partition(":")[0]


@dataclass(frozen=True)
class Call:
    """The facts about an attention call that decide between backends.

    Attributes:
        device_type: Such as "cuda".
        dtype: Of q, k and v.
        head_dim: Their last dimension.
        block_q: Queries per block of the plan.
        block_kv: Keys per block.
        strides_ok: Whether their last stride is 1.
        aligned: Whether Hopper's tensor descriptors can read them, see `fits_descriptors`.
        all_full: Whether every listed block is attended to in full: no pair test and no residual.
        device_index: Which of the devices; None for the current one.
        partial: Whether the plan has a pair test, so that blocks may be kept in part.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    block_q: int
    block_kv: int
    strides_ok: bool = True
    aligned: bool = True
    all_full: bool = True
    device_index: int | None = None
    partial: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_q: int,
        block_kv: int,
        *,
        all_full: bool = True,
        partial: bool = False,
    ) -> Call:
        """Reads the facts off the tensors of a call."""
        contiguous = all(t.stride(-1) == 1 for t in (q, k, v))
        aligned = all(fits_descriptors(t) for t in (q, k, v))
        facts = (q.device.type, q.dtype, q.shape[-1], block_q, block_kv, contiguous, aligned, all_full)
        return cls(*facts, q.device.index, partial)


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True if TRITON_INTERPRET asks Triton to run kernels on the CPU (for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _no_triton(call: Call) -> str | None:
    """Says what keeps the Triton kernel from running the call, or None."""
    if not _triton_installed():
        return "the triton package is not installed; run: pip install triton"
    if interpreting():
        if call.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly; use float32 or float16 with TRITON_INTERPRET=1"
    elif call.device_type != "cuda":
        return f"the tensors are on {call.device_type!r} and the kernel needs a CUDA or ROCm GPU; move them to 'cuda'"
    if call.head_dim > _MAX_HEAD_DIM:
        return f"head dim {call.head_dim} is above {_MAX_HEAD_DIM}; use backend='gather'"
    for name, block in (("block_q", call.block_q), ("block_kv", call.block_kv)):
        if block % _MIN_TILE:
            return f"{name}={block} is not a multiple of {_MIN_TILE}; rebuild the plan with blocks of 64 or 128"
    if not call.strides_ok:
        return "the head dimension of q, k or v is not contiguous (last stride 1); call .contiguous() on it"
    return None


def _check_triton(call: Call) -> Support:
    if (obstacle := _no_triton(call)) is not None:
        return Support("triton", False, obstacle)
    choice = choose_variant(call)
    return Support("triton", choice.ok, _kernel_reason(choice.ok, choice.reason), choice.variant)


def _check_triton_variant(variant: str, call: Call) -> Support:
    name = backend_name(variant)
    if (obstacle := _no_triton(call)) is not None:
        return Support(name, False, obstacle, variant)
    choice = check_variant(variant, call)
    return Support(name, choice.ok, _kernel_reason(choice.ok, choice.reason), variant)


def _kernel_reason(ok: bool, reason: str) -> str:
    where = "the interpreter (slow, for tests)" if interpreting() else "the GPU"
    return f"block-sparse kernel on {where}, {reason}" if ok else reason


def _check_gather(call: Call) -> Support:
    return Support("gather", True, f"gathered blocks and dense attention on {call.device_type}")


def _check_reference(call: Call) -> Support:
    return Support("reference", True, "dense float32 attention under the expanded mask, for checking")


def _no_flex(call: Call) -> str | None:
    """Says what keeps FlexAttention from running the call, or None."""
    if call.device_type not in ("cpu", "cuda"):
        return f"FlexAttention is not set up for tensors on {call.device_type!r}; use backend='gather'"
    if (problem := _flex_problem()) is not None:
        return f"{problem}, or use backend='gather'"
    if call.device_type == "cpu":
        return None
    if not _triton_installed():
        return "FlexAttention compiles to Triton, which is not installed; run: pip install triton"
    if interpreting():
        return "TRITON_INTERPRET is set, and FlexAttention's compiled kernels are not interpreted; unset it"
    if not _MIN_TILE <= call.head_dim <= _MAX_HEAD_DIM:
        return f"head dim {call.head_dim} is not within {_MIN_TILE} to {_MAX_HEAD_DIM}; use backend='gather'"
    for name, block in (("block_q", call.block_q), ("block_kv", call.block_kv)):
        if block % _MIN_TILE:
            return f"{name}={block} is not a multiple of {_MIN_TILE}; rebuild the plan with blocks of 64 or 128"
    return None


@cache
def _flex_problem() -> str | None:
    # Importing FlexAttention takes a second, and most calls never ask for it.
    from .flex.mask import flex_problem

    return flex_problem()


def _check_flex(call: Call) -> Support:
    obstacle = _no_flex(call)
    how = "FlexAttention, compiled once per shape, forward only"
    if call.device_type == "cpu":
        how = "FlexAttention's dense stand-in on the CPU (all scores in memory; for checking)"
    return Support("flex", obstacle is None, obstacle or how)


def _no_xformers(call: Call) -> str | None:
    """Says what keeps xformers from running the call, or None."""
    # The question costs an import and a tiny call, which most programs never need.
    from .xformers.probe import xformers_problem

    facts, index = (call.device_type, call.dtype, call.head_dim), call.device_index
    if (problem := xformers_problem(*facts, device_index=index)) is not None:
        return problem
    if not call.partial or (problem := xformers_problem(*facts, bias=True, device_index=index)) is None:
        return None
    return f"the plan has partial blocks, which need a bias, but {problem}, or build block-aligned plans"


def _check_xformers(call: Call) -> Support:
    obstacle = _no_xformers(call)
    return Support("xformers", obstacle is None, obstacle or "xformers on gathered blocks; runs only if named")


_CHECKS: dict[str, Callable[[Call], Support]] = {
    "triton": _check_triton,
    "gather": _check_gather,
    "reference": _check_reference,
    "flex": _check_flex,
    "xformers": _check_xformers,
    **{backend_name(variant): partial(_check_triton_variant, variant) for variant in VARIANTS},
}


def check(backend: str, call: Call) -> Support:
    """Checks one backend.

    Raises:
        ValueError: Unknown backend name.
    """
    if backend not in _CHECKS:
        raise ValueError(f"Unknown attention backend {backend!r}. Choose 'auto' or one of {', '.join(NAMES)}.")
    return _CHECKS[backend](call)


def choose(call: Call) -> Support:
    """Picks the backend for "auto": Triton on a GPU, gather elsewhere; the reason says why not Triton.

    The interpreter is for tests and never chosen on its own.
    """
    triton = _check_triton(call)
    if triton.ok and not interpreting():
        return triton
    obstacle = "TRITON_INTERPRET is set, which is for tests" if triton.ok else triton.reason
    return Support("gather", True, f"{_check_gather(call).reason}; not triton: {obstacle}")
