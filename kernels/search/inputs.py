"""What all searches check before they start, and where they run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..support import DTYPES, Call, Support, check

SEARCH_BACKENDS = ("torch", "triton")


def check_search(q: Tensor, k: Tensor, block_q: int, block_kv: int) -> None:
    """Refuses tensors and block sizes that do not fit together; reads shapes only, never values.

    Args:
        q: `[B, q_len, H, D]`.
        k: `[B, kv_len, H, D]`.
        block_q: Queries per block.
        block_kv: Keys per block.

    Raises:
        ValueError: Wrong rank, dtype, device, shape or block size.
    """
    for name, tensor in (("q", q), ("k", k)):
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name} must be [batch, tokens, heads, head_dim] with at least one of each, "
                f"got shape {tuple(tensor.shape)}."
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; accepted are float32, float16 and bfloat16.")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(f"q is {q.dtype} on {q.device}, k is {k.dtype} on {k.device}. Make them the same.")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together: batch, heads and head_dim must be equal. "
            "The layout is [batch, tokens, heads, head_dim]; repeat key heads before the call if there are fewer."
        )
    check_block("block_q", block_q)
    check_block("block_kv", block_kv)


def check_block(name: str, block: int) -> None:
    """Refuses a block size below 1.

    Raises:
        ValueError: It is.
    """
    if block < 1:
        raise ValueError(f"{name} must be at least 1, got {block}.")


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the scores: `scale`, or `head_dim ** -0.5` if it is None.

    Raises:
        ValueError: The scale is not positive.
    """
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}. Leave it out for head_dim ** -0.5.")
    return head_dim**-0.5 if scale is None else float(scale)


def search_backend(backend: str, *tensors: Tensor, block_q: int = 16, block_kv: int = 16) -> Support:
    """Settles where a search runs: "auto" is Triton on a GPU where it can, torch elsewhere.

    Args:
        backend: "auto" or one of `SEARCH_BACKENDS`.
        tensors: What the kernels would read, `[B, S, H, D]` each.
        block_q: Queries per block, if the kernel cares.
        block_kv: Keys per block, likewise.

    Returns:
        The backend and why it was taken.

    Raises:
        ValueError: Unknown name, or Triton is named and cannot run this search.
    """
    if backend not in ("auto", *SEARCH_BACKENDS):
        raise ValueError(f"Unknown search backend {backend!r}. Choose 'auto' or one of {', '.join(SEARCH_BACKENDS)}.")
    if backend == "torch":
        return Support("torch", True, "asked for")
    first, device = tensors[0], tensors[0].device
    if backend == "auto" and device.type != "cuda":
        return Support("torch", True, f"the tensors are on {device.type!r} and Triton needs a GPU")
    facts = (device.type, first.dtype, first.shape[-1], block_q, block_kv, all(t.stride(-1) == 1 for t in tensors))
    # The search kernels read through pointers, so what the other variants need does not matter.
    support = check("triton:pointer", Call(*facts, device_index=device.index))
    if support.ok:
        return replace(support, backend="triton")
    if backend == "triton":
        raise ValueError(f"The triton search cannot run this call: {support.reason}.")
    return Support("torch", True, f"not triton: {support.reason}")


def tokens_per_block(length: int, block: int, blocks: int, device: torch.device) -> Tensor:
    """Real tokens of each block, float32 `[blocks]`: `block`, less in the last one, 0 in blocks of padding."""
    starts = torch.arange(blocks, device=device) * block
    return (length - starts).clamp(0, block).float()
