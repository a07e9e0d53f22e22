"""Block-sparse flash attention for Hopper in Gluon: launching it, and why it cannot be.

Gluon is experimental and changes from one Triton to the next.  Importing this module always works where Triton does;
`gluon_problem` says what is missing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ..sparse_plan import SparsePlan
from .hopper import launch_hopper


@cache
def _load() -> tuple[Any, str | None]:
    """The kernel, or None and what is missing."""
    try:
        from .gluon_kernel import gluon_kernel
    except (ImportError, AttributeError) as missing:
        return None, f"this Triton's Gluon lacks what the kernel needs ({missing}); run: pip install 'triton>=3.6'"
    return gluon_kernel, None


def gluon_problem() -> str | None:
    """Says what keeps Gluon from compiling the kernel with this Triton, or None."""
    return _load()[1]


def gluon_attention(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float, out: Tensor, lse: Tensor) -> None:
    """Launches the kernel; arguments as in `launch_hopper`.

    Raises:
        RuntimeError: Gluon is missing or lacks a part.
    """
    kernel, problem = _load()
    if problem is not None:
        raise RuntimeError(f"The Gluon attention kernel is not available: {problem}.")
    launch_hopper(kernel, q, k, v, plan, scale, out, lse)
