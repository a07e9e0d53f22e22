"""What the key blocks that nobody lists still contribute: each one as a single key and value, its mean.

A query that does not look at key block j scores the block's mean key once and counts the result for every key of it:
weight `n_j * exp(scale * q . k_mean_j)`, value `v_sum_j / n_j`, in the same softmax as the listed keys.  So little is
lost where keys and values vary smoothly within a block, at one score per block (PISA, arXiv 2602.01077; Sol-Attn,
arXiv 2607.24027).  Listed blocks, PARTIAL ones included, take no part; whatever has to be exact, such as text, is
listed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .permute import permuted
from .search.inputs import SEARCH_BACKENDS, check_block, tokens_per_block
from .search.pooled import block_means, differentiable_means
from .sparse_plan import SparsePlan
from .support import DTYPES


@dataclass(frozen=True, eq=False)
class Residual:
    """Mean keys and summed values of all key blocks, in plan positions.  Build it with `block_residual`.

    Attributes:
        k_mean: float32 `[B, H, NK, D]`, mean key of each block.
        v_sum: float32 `[B, H, NK, D]`, sum of the values of each block.
        sizes: float32 `[NK]`, keys in each block; one of size 0 contributes nothing.
        ordered: Whether the blocks are cut from tokens in the order of a plan, `SparsePlan.key_order`.
    """

    k_mean: Tensor
    v_sum: Tensor
    sizes: Tensor
    ordered: bool = False

    def __post_init__(self) -> None:
        for name, tensor in (("k_mean", self.k_mean), ("v_sum", self.v_sum), ("sizes", self.sizes)):
            if tensor.dtype != torch.float32:
                raise ValueError(f"Residual.{name} must be float32, got {tensor.dtype}. Convert it with .float().")
            if tensor.device != self.k_mean.device:
                raise ValueError(
                    f"Residual.{name} is on {tensor.device}, k_mean on {self.k_mean.device}. Put them together."
                )
        fits = self.k_mean.ndim == 4 and self.v_sum.shape == self.k_mean.shape
        if not fits or self.sizes.shape != self.k_mean.shape[2:3]:
            raise ValueError(
                "Residual.k_mean and v_sum must both be [batch, heads, key blocks, head_dim] and sizes [key blocks], "
                f"got {tuple(self.k_mean.shape)}, {tuple(self.v_sum.shape)} and {tuple(self.sizes.shape)}."
            )


def block_residual(
    k: Tensor, v: Tensor, block_kv: int, *, order: Tensor | None = None, backend: str = "auto"
) -> Residual:
    """Averages keys and adds up values block by block, in float32.  Differentiable in k and v.

    Args:
        k: `[B, H, kv_len, D]`, float32, float16 or bfloat16, any strides, tokens in their own order.
        v: `[B, H, kv_len, D]`, likewise.
        block_kv: Keys per block, `SparsePlan.block_kv`; the last block may be short.
        order: `SparsePlan.key_order` of the plan that the residual goes with, if it has one.
        backend: Who takes the means: "auto", "torch" or "triton".  Under torch.compile, and where a
            gradient will flow, it is always torch.

    Returns:
        The residual, on the device of k.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or the named backend cannot run the call.
    """
    _check_keys(k, v, block_kv, order)
    if backend not in ("auto", *SEARCH_BACKENDS):
        raise ValueError(f"Unknown search backend {backend!r}. Choose 'auto' or one of {', '.join(SEARCH_BACKENDS)}.")
    k, v = permuted(k, order), permuted(v, order)
    sizes = tokens_per_block(k.shape[2], block_kv, -(-k.shape[2] // block_kv), k.device)
    k_mean, v_mean = (_means(x.transpose(1, 2), block_kv, backend) for x in (k, v))
    return Residual(k_mean, v_mean * sizes[:, None], sizes, ordered=order is not None)


def check_residual(residual: Residual, k: Tensor, plan: SparsePlan) -> None:
    """Refuses a residual that does not belong to the keys and the plan of a call.

    Args:
        residual: What `attend` was given.
        k: `[B, H, kv_len, D]`.
        plan: Who attends to whom.

    Raises:
        ValueError: Its shape, device or order do not fit.
    """
    block_kv = plan.block_kv
    if residual.ordered != (plan.key_order is not None):
        have, lack = ("residual", "plan") if residual.ordered else ("plan", "residual")
        raise ValueError(
            f"The {have} has a token order, the {lack} has none. Build the residual with block_residual(k, v, "
            "plan.block_kv, order=plan.key_order)."
        )
    wanted = (*k.shape[:2], -(-k.shape[2] // block_kv), k.shape[3])
    if residual.k_mean.shape != wanted:
        raise ValueError(
            f"The residual has centroids of shape {tuple(residual.k_mean.shape)}; {k.shape[2]} keys in blocks of "
            f"{block_kv} need {wanted}. Build it with block_residual(k, v, plan.block_kv, order=plan.key_order)."
        )
    if residual.k_mean.device != k.device:
        raise ValueError(
            f"The residual is on {residual.k_mean.device}, k is on {k.device}. Build it from the k and v of the call."
        )


def _means(x: Tensor, block: int, backend: str) -> Tensor:
    # Compilers fuse torch's own operators and differentiate them; a kernel of ours they could only call.
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return differentiable_means(x, block)
    return block_means(x, block, backend=backend)


def _check_keys(k: Tensor, v: Tensor, block_kv: int, order: Tensor | None) -> None:
    check_block("block_kv", block_kv)
    if k.ndim != 4 or 0 in k.shape or v.shape != k.shape:
        raise ValueError(
            "k and v must both be [batch, heads, tokens, head_dim] with at least one of each, got "
            f"{tuple(k.shape)} and {tuple(v.shape)}."
        )
    if k.dtype not in DTYPES or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"k is {k.dtype} on {k.device}, v is {v.dtype} on {v.device}; accepted are float32, float16 and bfloat16, "
            "the same for both."
        )
    per_head = (k.shape[2],) if order is None or order.ndim == 1 else (*_lead(order, k), k.shape[2])
    if order is not None and (order.dtype != torch.int64 or tuple(order.shape) != per_head):
        raise ValueError(
            f"order must be int64 of shape ({k.shape[2]},), or that behind {k.shape[0]} or 1 batch items and "
            f"{k.shape[1]} or 1 heads, got {order.dtype} of {tuple(order.shape)}. Pass SparsePlan.key_order."
        )
    if order is not None and order.device != k.device:
        raise ValueError(f"order is on {order.device}, k is on {k.device}. Move it with order.to(k.device).")


def _lead(order: Tensor, k: Tensor) -> tuple[int, ...]:
    """The first dimensions that an order per head should have: 1, or those of k."""
    return tuple(1 if n == 1 else m for n, m in zip(order.shape[:-1], k.shape[:2], strict=False))
