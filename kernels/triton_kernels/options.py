"""What can be set about the pointer kernel without changing what it computes: the order of its programs, its softmax.

None of it is on by default.  Whether it helps depends on the GPU, and nothing becomes a default before it has been
measured; the defaults are what every other check of this package runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SOFTMAX = ("online", "lazy", "static")

_orders = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class KernelOptions:
    """Scheduling and softmax of the pointer kernel.

    Attributes:
        longest_first: Start the rows of a head with the longest lists first, so that no long row begins when all
            others are done.  Worth a try where lists differ in length.  Off by default: neighboring rows often share
            their keys and find them in the L2 cache, which another order may lose.
        softmax: "online" raises the running maximum and rescales the output at every step.  "lazy" does so only when
            the maximum of some row grew by more than 8 in base 2 (FlashAttention-4); weights stay below `2 ** 8`.
            "static" keeps no maximum where `scale * max|q| * max|k|` promises base-2 scores within 60 of zero, as
            normalized queries and keys do, and is "online" in every tile of queries where it does not.
    """

    longest_first: bool = False
    softmax: str = "online"

    def __post_init__(self) -> None:
        if self.softmax not in SOFTMAX:
            raise ValueError(f"Unknown softmax {self.softmax!r}. Choose one of {', '.join(SOFTMAX)}.")

    def check(self, dtype: torch.dtype, capability: tuple[int, int] | None) -> None:
        """Refuses what a dtype cannot hold, and what cannot be compiled.

        Args:
            dtype: Of q, k and v.
            capability: CUDA compute capability, or None for AMD GPUs and the interpreter.

        Raises:
            ValueError: "static" with float16, whose range its weights exceed, or "lazy" on data center Blackwell,
                where Triton 3.6 fails to compile a branch that depends on the maxima of rows.
        """
        if self.softmax == "static" and dtype == torch.float16:
            raise ValueError("softmax='static' overflows float16. Use 'online' or 'lazy', or bfloat16 tensors.")
        if self.softmax == "lazy" and capability is not None and capability[0] == 10:
            raise ValueError("Triton cannot compile softmax='lazy' for this GPU (sm_100). Use 'online' or 'static'.")


DEFAULT_OPTIONS = KernelOptions()


def longest_first(counts: Tensor) -> Tensor:
    """Rows of each head by descending list length; sorted on the device, once for each tensor of counts.

    A plan that is used again finds its order here, but one that was recorded into a CUDA graph, and so not sorted yet.
    Counts that were changed in place meanwhile get the order of before: still each row once.

    Args:
        counts: int32 `[..., NQ]`, `SparsePlan.counts`.

    Returns:
        int32, shape and device of `counts`, contiguous.
    """
    order: Tensor | None = _orders.get(counts)
    if order is None:
        order = counts.argsort(dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            _orders[counts] = order
    return order


def largest_norms(k: Tensor) -> Tensor:
    """Length of the longest key of each head.

    Args:
        k: `[B, H, kv_len, D]`, any dtype and strides.

    Returns:
        float32 `[B, H]`, contiguous.
    """
    return torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32).amax(-1).contiguous()
