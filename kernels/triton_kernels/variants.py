"""The variants of the Triton forward kernel: which of them can take a call, which one does, and why not another.

"pointer" runs everywhere Triton does.  "tma" and "gluon" are for Hopper and for plans without PARTIAL blocks; "tma" is
taken on its own once its self-check has passed, "gluon" only if asked for by name.

Importing this module imports neither Triton nor a driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .self_check import Outcome, self_check

if TYPE_CHECKING:
    from ..residual import Residual
    from ..sparse_plan import SparsePlan
    from ..support import Call

VARIANTS = ("pointer", "tma", "gluon")

_HOPPER = 9
_MAX_HEAD_DIM = 128
_BLOCK_Q, _BLOCK_KV = 128, 64


@dataclass(frozen=True)
class Choice:
    """A variant and what speaks for or against it.

    Attributes:
        variant: One of `VARIANTS`.
        ok: True if it runs the call.
        reason: What makes it fit, or what stands in the way and what to do.
    """

    variant: str
    ok: bool
    reason: str


def backend_name(variant: str) -> str:
    """The name by which `attend(backend=...)` asks for a variant: "triton:tma" for "tma"."""
    return f"triton:{variant}"


def check_variant(variant: str, call: Call) -> Choice:
    """Says whether a variant takes a call that the Triton backend as such takes.

    Runs the variant's self-check on the call's device, once per process.

    Args:
        variant: One of `VARIANTS`.
        call: Facts about the call.

    Returns:
        The verdict.
    """
    obstacle = _obstacle(variant, call)
    if obstacle is not None:
        return Choice(variant, False, obstacle)
    outcome = _outcome(variant, call)
    if outcome is None:
        return Choice(variant, True, f"the {variant} variant")
    return Choice(variant, outcome.ok, f"the {variant} variant ({outcome.reason})" if outcome.ok else outcome.reason)


def choose_variant(call: Call) -> Choice:
    """Picks the variant for a call that the Triton backend takes: tma where it can run and is right, else pointer.

    Args:
        call: Facts about the call.

    Returns:
        The choice; not ok if even the pointer variant fails its self-check.
    """
    from ..support import interpreting

    if interpreting():
        return check_variant("pointer", call)
    tma = check_variant("tma", call)
    if tma.ok:
        return tma
    pointer = check_variant("pointer", call)
    return Choice("pointer", pointer.ok, f"{pointer.reason}; not tma: {tma.reason}")


def attend_with(
    variant: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    scale: float,
    residual: Residual | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs one variant on a call it takes.

    Args:
        variant: One of `VARIANTS`.
        q: `[B, H, q_len, D]`, last stride 1.
        k: `[B, H, kv_len, D]`, likewise.
        v: `[B, H, kv_len, D]`, likewise.
        plan: Who attends to whom, in plan positions.
        scale: Positive factor on the scores.
        residual: What blocks that are not listed contribute; for "pointer" only.

    Returns:
        `(out, lse)`: out contiguous in the dtype and shape of q; lse float32 `[B, H, q_len]`, natural log.
    """
    # Triton takes a moment to import and is missing on many CPU installs.
    if variant == "pointer":
        from .forward import triton_attention

        return triton_attention(q, k, v, plan, scale, residual)
    if residual is not None:
        raise ValueError(f"The {variant!r} variant computes no residual; check_variant says so. Use 'pointer'.")
    if variant == "tma":
        from .tma import tma_attention as attention
    else:
        from .gluon_hopper import gluon_attention as attention
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.device.type != "cuda":
        attention(q, k, v, plan, scale, out, lse)
        return out, lse
    with torch.cuda.device(q.device):
        attention(q, k, v, plan, scale, out, lse)
    return out, lse


def fits_descriptors(tensor: Tensor) -> bool:
    """Tells whether a `[B, H, tokens, D]` tensor can be read through descriptors: 16-byte base and strides."""
    size = tensor.element_size()
    outer = [stride * size for stride, n in zip(tensor.stride()[:2], tensor.shape[:2], strict=True) if n > 1]
    rows = tensor.stride(2)
    return tensor.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in (*outer, rows * size)) and rows >= tensor.shape[3]


def _obstacle(variant: str, call: Call) -> str | None:
    """Says what about the call keeps a variant from running it, or None."""
    from ..support import interpreting

    if variant == "pointer":
        return None
    if interpreting():
        if variant == "gluon":
            return "Gluon kernels cannot be interpreted; unset TRITON_INTERPRET"
    elif (problem := _hardware_problem(variant, call)) is not None:
        return problem
    if call.head_dim > _MAX_HEAD_DIM:
        return f"head dim {call.head_dim} is above {_MAX_HEAD_DIM}"
    for name, block, unit in (("block_q", call.block_q, _BLOCK_Q), ("block_kv", call.block_kv, _BLOCK_KV)):
        if block % unit:
            return f"{name}={block} is not a multiple of {unit}; rebuild the plan with blocks of 128"
    if not call.all_full:
        return "the plan has a pair test or a residual, which only the pointer variant computes"
    if not call.aligned:
        return "q, k or v has a base or a stride that is not a multiple of 16 bytes, or overlapping tokens; copy it"
    return None


def _hardware_problem(variant: str, call: Call) -> str | None:
    capability = _capability(call.device_index)
    if capability is None or capability[0] != _HOPPER:
        there = "there is none" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper), and {there}"
    if call.dtype == torch.float32:
        return "float32 has no place in its registers; use bfloat16 or float16"
    if variant == "gluon":
        return _gluon_problem()
    return None


@cache
def _gpu_there() -> bool:
    return torch.cuda.is_available()


@cache
def _capability(device_index: int | None) -> tuple[int, int] | None:
    if torch.version.hip or not _gpu_there():
        return None
    return torch.cuda.get_device_capability(device_index)


def _gluon_problem() -> str | None:
    from .gluon_hopper import gluon_problem

    return gluon_problem()


def _outcome(variant: str, call: Call) -> Outcome | None:
    """The self-check of a variant on the call's device; None where there is nothing to check on."""
    from ..support import interpreting

    if interpreting() or call.device_type != "cuda" or not _gpu_there():
        return None
    index = torch.cuda.current_device() if call.device_index is None else call.device_index
    return self_check(variant, torch.device("cuda", index))
