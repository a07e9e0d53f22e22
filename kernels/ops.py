"""The attention call as one torch operator, so that torch.compile sees a single opaque node.

The operator takes tensors and numbers only.  Which backend runs is settled inside it, at run time, and two plans of
the same shapes share one compiled graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backward import BackwardInputs, Gradients, reference_backward
from .gather.backward import gather_backward
from .gather.forward import gather_attention
from .reference import reference_attention
from .sparse_plan import Band, PlanStats, SparsePlan
from .support import Call, check, choose

_UNCOUNTED = PlanStats(density=float("nan"), density_per_head=(), method="operator")


# Spelled out, since older torch releases do not read postponed annotations such as `Tensor | None`.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, Tensor full_counts, Tensor? widths, int block_q, "
    "int block_kv, int frame_tokens, int video_len, int sink_tokens, float scale, str backend"
)
_SCHEMA = f"({_ARGUMENTS}) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, bool need_q, bool need_kv, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("dit_accel::block_sparse_attention", mutates_args=(), schema=_SCHEMA)
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    full_counts: Tensor,
    widths: Tensor | None,
    block_q: int,
    block_kv: int,
    frame_tokens: int,
    video_len: int,
    sink_tokens: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attends under block lists; use `dit_accel.kernels.attend.attend`, which checks its arguments.

    Args:
        q: `[B, H, q_len, D]`.
        k: `[B, H, kv_len, D]`.
        v: `[B, H, kv_len, D]`.
        indices: See `SparsePlan.indices`.
        counts: See `SparsePlan.counts`.
        full_counts: See `SparsePlan.full_counts`.
        widths: `Band.widths`, or None for a plan without a band; the three numbers of the band are then unused.
        block_q: Queries per block.
        block_kv: Keys per block.
        frame_tokens: `Band.frame_tokens`.
        video_len: `Band.video_len`.
        sink_tokens: `Band.sink_tokens`.
        scale: Factor on the scores.
        backend: "auto" or a backend name.

    Returns:
        `(out, lse)`: out like q (contiguous), lse float32 `[B, H, q_len]`, natural log.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    numbers = (block_q, block_kv, frame_tokens, video_len, sink_tokens)
    plan = _plan(q, k, indices, counts, full_counts, widths, *numbers)
    chosen = _settled(backend, Call.of(q, k, v, block_q, block_kv))
    if chosen == "reference":
        return reference_attention(q, k, v, plan, scale)
    if chosen == "gather":
        return gather_attention(q, k, v, plan, scale)
    if chosen == "flex":
        from .flex.attention import flex_plan_attention

        return flex_plan_attention(q, k, v, plan, scale)
    # Triton takes a moment to import and is missing on many CPU installs.
    from .triton_kernels.forward import triton_attention

    return triton_attention(q, k, v, plan, scale)


def _plan(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    counts: Tensor,
    full_counts: Tensor,
    widths: Tensor | None,
    block_q: int,
    block_kv: int,
    frame_tokens: int,
    video_len: int,
    sink_tokens: int,
) -> SparsePlan:
    band = None if widths is None else Band(frame_tokens, widths, video_len, sink_tokens)
    return SparsePlan(q.shape[2], k.shape[2], block_q, block_kv, indices, counts, full_counts, _UNCOUNTED, band)


def _settled(backend: str, call: Call) -> str:
    support = choose(call) if backend == "auto" else check(backend, call)
    if not support.ok:
        raise ValueError(f"The {support.backend} attention backend cannot run this call: {support.reason}.")
    return support.backend


@block_sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    full_counts: Tensor,
    widths: Tensor | None,
    block_q: int,
    block_kv: int,
    frame_tokens: int,
    video_len: int,
    sink_tokens: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("dit_accel::block_sparse_attention_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
def block_sparse_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, need_q: bool, need_kv: bool, *arguments: Any
) -> Gradients:
    """Differentiates `block_sparse_attention`, on the backend that ran it; autograd calls this.

    Args:
        grad_out: Gradient of out, any strides.
        grad_lse: Gradient of lse, any strides.
        out: Output of the forward pass.
        lse: Its log-sum-exp.
        need_q: Whether the gradient of q is asked for.
        need_kv: Whether the gradients of k and v are asked for.
        *arguments: Those of `block_sparse_attention`, in its order.

    Returns:
        `(grad_q, grad_k, grad_v)`, contiguous, in the shapes and dtype of q, k and v; undefined where not asked for.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    q, k, v, *lists, scale, backend = arguments
    plan = _plan(q, k, *lists)
    inputs = BackwardInputs(q, k, v, out, lse, grad_out, grad_lse, need_q, need_kv)
    chosen = _settled(backend, Call.of(q, k, v, plan.block_q, plan.block_kv))
    if chosen == "reference":
        return reference_backward(inputs, plan, scale)
    if chosen == "gather":
        return gather_backward(inputs, plan, scale)
    from .triton_kernels.backward import triton_backward

    return triton_backward(inputs, plan, scale)


@block_sparse_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, need_q: bool, need_kv: bool, *arguments: Any
) -> Gradients:
    q, k, v = arguments[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # Runs only if a gradient will be asked for; without, nothing is kept.
    if inputs[-1] == "flex":
        raise NotImplementedError(
            "The flex attention backend has no backward pass, but q, k or v requires a gradient. "
            "Use backend='auto', 'triton' or 'gather', or run under torch.no_grad()."
        )
    tensors, ctx.numbers = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    grads = block_sparse_attention_backward(
        grad_out, grad_lse, out, lse, need_q, need_k or need_v, *tensors, *ctx.numbers
    )
    needed = zip(grads, (need_q, need_k, need_v), strict=True)
    return *(grad if need else None for grad, need in needed), *(None,) * (len(tensors) - 3 + len(ctx.numbers))


torch.library.register_autograd("dit_accel::block_sparse_attention", _differentiate, setup_context=_save)
