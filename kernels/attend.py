"""The one way into sparse attention: `attend(q, k, v, plan)`."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .ops import block_sparse_attention
from .pair_tests import encode
from .permute import permuted, put_back
from .residual import Residual, check_residual
from .sparse_plan import SparsePlan
from .support import BACKENDS, DTYPES, NAMES, Call, Support, check, choose

__all__ = ["BACKENDS", "Support", "attend", "choose_backend", "explain"]


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    residual: Residual | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    residual: Residual | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    residual: Residual | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attends from queries to the keys that the plan lists.

    Runs under `torch.compile(fullgraph=True)`; a second plan of the same shapes reuses the graph.
    Differentiable in q, k and v (once; through out and lse), on the backend that ran the forward pass.

    Args:
        q: `[B, H, q_len, D]`, float32, float16 or bfloat16, any strides (a transposed `[B, S, H, D]` is fine).
        k: `[B, H, kv_len, D]`, dtype and device of q.
        v: `[B, H, kv_len, D]`, likewise.
        plan: Who attends to whom, on the same device.
        residual: Means that stand in for the blocks that a row does not list, from `block_residual(k, v,
            plan.block_kv, order=plan.key_order)`; gradients flow through it, too.  None: those blocks count nothing.
        scale: Positive factor on the scores; `D ** -0.5` by default.
        return_lse: Also return the log-sum-exp of the scaled scores.
        backend: "auto" (Triton on a GPU, gather elsewhere) or one of `BACKENDS`; "flex" and "xformers" only if named.
            "triton:pointer", "triton:tma" or "triton:gluon" asks for a variant of the Triton kernel.  What is named
            runs or raises; "auto" first copies tensors on a GPU whose head dimension is not contiguous.

    Returns:
        `out`, shape and dtype of q; with `return_lse` `(out, lse)`, lse float32 `[B, H, q_len]` in natural log.  A
        query without any key gets out 0 and lse -inf.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or the named backend cannot run the call.
        NotImplementedError: A gradient is asked for of the flex backend, which has no backward pass.
    """
    _check_tensors(q, k, v)
    _check_plan(q, k, plan)
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"Unknown attention backend {backend!r}. Choose 'auto' or one of {', '.join(NAMES)}.")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}. Leave it out for head_dim ** -0.5.")
    if residual is not None:
        check_residual(residual, k, plan)
    q, k, v = permuted(q, plan.order), permuted(k, plan.key_order), permuted(v, plan.key_order)
    if backend == "auto":
        q, k, v = _readable(q), _readable(k), _readable(v)
    test = encode(plan.pair_test)
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        plan.indices,
        plan.counts,
        plan.full_counts,
        test.table,
        test.lookup,
        test.kind,
        test.numbers,
        plan.block_q,
        plan.block_kv,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        backend,
        *(() if residual is None else (residual.k_mean, residual.v_sum, residual.sizes)),
    )
    out = put_back(out, plan.order)
    return (out, put_back(lse, plan.order)) if return_lse else out


def explain(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, *, residual: Residual | None = None) -> list[Support]:
    """Says for every backend whether it can run this call if it is named, and why (not).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, whatever the backend.
    """
    _check_tensors(q, k, v)
    _check_plan(q, k, plan)
    if residual is not None:
        check_residual(residual, k, plan)
    partial = plan.pair_test is not None
    all_full = not partial and residual is None
    read = _as_read(q, plan.order), _as_read(k, plan.key_order), _as_read(v, plan.key_order)
    call = Call.of(*read, plan.block_q, plan.block_kv, all_full=all_full, partial=partial)
    return [check(backend, call) for backend in BACKENDS]


def choose_backend(device_type: str, dtype: torch.dtype, head_dim: int, plan: SparsePlan) -> Support:
    """Says what "auto" runs for such tensors with a contiguous head dimension; the reason says why not Triton."""
    facts = (device_type, dtype, head_dim, plan.block_q, plan.block_kv)
    # A plan made elsewhere, such as on the CPU, leaves open which GPU it is for.
    index = plan.device.index if plan.device.type == device_type else None
    partial = plan.pair_test is not None
    return choose(Call(*facts, all_full=not partial, device_index=index, partial=partial))


def _readable(x: Tensor) -> Tensor:
    """x, or on a GPU a copy whose head dimension is contiguous: it costs little beside attention without Triton."""
    return x.contiguous() if x.device.type == "cuda" and x.stride(-1) != 1 else x


def _as_read(x: Tensor, order: Tensor | None) -> Tensor:
    """What a backend reads in the place of x, as far as strides tell: a permuted tensor is another one."""
    return x if order is None else x.new_empty(x.shape)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], got shape {tuple(tensor.shape)}.")
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tensor.dtype}; accepted are float32, float16 and bfloat16. Convert it first."
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q is {q.dtype} on {q.device}, but {name} is {tensor.dtype} on {tensor.device}. Make them the same."
            )
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together: batch, heads and "
            "head_dim must be equal, and k and v alike. Repeat key heads before the call if there are fewer."
        )
    if q.shape[0] == 0 or q.shape[1] == 0 or q.shape[3] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; batch, heads and head_dim must be at least 1.")


def _check_plan(q: Tensor, k: Tensor, plan: SparsePlan) -> None:
    if plan.q_len != q.shape[2] or plan.kv_len != k.shape[2]:
        raise ValueError(
            f"The plan is for {plan.q_len} queries and {plan.kv_len} keys, the tensors hold {q.shape[2]} and "
            f"{k.shape[2]}. Build the plan for this shape."
        )
    parts = {"lists": plan.indices, "an order": plan.order, "a kv_order": plan.kv_order}
    for name, part in parts.items():
        if part is None or part.ndim == 1:
            continue
        batch, heads = part.shape[:2]
        if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
            raise ValueError(
                f"The plan has {name} for batch {batch} and {heads} heads; accepted are 1 or {q.shape[0]} batch items "
                f"and 1 or {q.shape[1]} heads."
            )
    if plan.device != q.device:
        raise ValueError(f"The plan is on {plan.device}, q is on {q.device}. Move it with plan.to(q.device).")
