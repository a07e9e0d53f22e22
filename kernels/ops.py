"""The attention call as one torch operator, so that torch.compile sees a single opaque node.

The operator takes tensors and numbers only.  Which backend runs is settled inside it, at run time, and two plans of
the same shapes share one compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backward import BackwardInputs, Gradients, reference_backward
from .gather.backward import gather_backward
from .gather.forward import gather_attention
from .pair_tests import decode
from .precision import in_full_precision
from .reference import reference_attention
from .residual import Residual
from .residual_attention import add_residual, centroid_backward, rounded
from .sparse_plan import PlanStats, SparsePlan
from .support import Call, Support, check, choose
from .triton_kernels.variants import attend_with
from .xformers.attention import xformers_attention

_UNCOUNTED = PlanStats(density=float("nan"), density_per_head=(), method="operator")


# Spelled out, since older torch releases do not read postponed annotations such as `Tensor | None`.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, Tensor full_counts, Tensor? test_table, "
    "Tensor? test_lookup, SymInt test_kind, SymInt[] test_numbers, SymInt block_q, SymInt block_kv, float scale, "
    "str backend, Tensor? k_mean=None, Tensor? v_sum=None, Tensor? sizes=None"
)
# How many of them are tensors at the beginning, and at the end.
_TENSORS, _MEANS = 8, 3
_SCHEMA = f"({_ARGUMENTS}) -> (Tensor, Tensor)"
# Without defaults: arguments that equal theirs would be left out of the call.
_GIVEN = _ARGUMENTS.replace("=None", "")
_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, bool need_q, bool need_kv, {_GIVEN}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("dit_accel::block_sparse_attention", mutates_args=(), schema=_SCHEMA)
@in_full_precision
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    full_counts: Tensor,
    test_table: Tensor | None,
    test_lookup: Tensor | None,
    test_kind: int,
    test_numbers: Sequence[int],
    block_q: int,
    block_kv: int,
    scale: float,
    backend: str,
    k_mean: Tensor | None = None,
    v_sum: Tensor | None = None,
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends under block lists; use `dit_accel.kernels.attend.attend`, which checks its arguments.

    Args:
        q: `[B, H, q_len, D]`.
        k: `[B, H, kv_len, D]`.
        v: `[B, H, kv_len, D]`.
        indices: See `SparsePlan.indices`.
        counts: See `SparsePlan.counts`.
        full_counts: See `SparsePlan.full_counts`.
        test_table: `EncodedTest.table` of the plan's pair test.
        test_lookup: `EncodedTest.lookup`.
        test_kind: `EncodedTest.kind`.
        test_numbers: `EncodedTest.numbers`.
        block_q: Queries per block.
        block_kv: Keys per block.
        scale: Factor on the scores.
        backend: "auto" or a backend name.
        k_mean: `Residual.k_mean`, or None for attention to listed blocks only.
        v_sum: `Residual.v_sum`.
        sizes: `Residual.sizes`.

    Returns:
        `(out, lse)`: out like q (contiguous), lse float32 `[B, H, q_len]`, natural log.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    test = (test_table, test_lookup, test_kind, test_numbers)
    plan = _plan(q, k, indices, counts, full_counts, *test, block_q, block_kv)
    residual = _residual(k_mean, v_sum, sizes)
    settled = _settled(backend, _call(q, k, v, plan, residual))
    chosen = settled.family
    if chosen == "reference":
        return reference_attention(q, k, v, plan, scale, residual)
    if chosen == "triton":
        return attend_with(settled.variant, q, k, v, plan, scale, residual)
    if chosen == "gather":
        listed = gather_attention(q, k, v, plan, scale)
    elif chosen == "xformers":
        listed = xformers_attention(q, k, v, plan, scale)
    else:
        from .flex.attention import flex_plan_attention

        listed = flex_plan_attention(q, k, v, plan, scale)
    return listed if residual is None else add_residual(listed, q, residual, plan, scale)


def _residual(k_mean: Tensor | None, v_sum: Tensor | None, sizes: Tensor | None) -> Residual | None:
    if k_mean is None or v_sum is None or sizes is None:
        return None
    return Residual(k_mean, v_sum, sizes)


def _plan(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    counts: Tensor,
    full_counts: Tensor,
    test_table: Tensor | None,
    test_lookup: Tensor | None,
    test_kind: int,
    test_numbers: Sequence[int],
    block_q: int,
    block_kv: int,
) -> SparsePlan:
    test = decode(test_kind, test_table, test_lookup, test_numbers)
    # A plan without a test has its lists in order already, and one tensor for both counts says so.
    full_counts = counts if test is None else full_counts
    return SparsePlan(q.shape[2], k.shape[2], block_q, block_kv, indices, counts, full_counts, _UNCOUNTED, test)


def _call(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, residual: Residual | None) -> Call:
    partial = plan.pair_test is not None
    all_full = not partial and residual is None
    return Call.of(q, k, v, plan.block_q, plan.block_kv, all_full=all_full, partial=partial)


def _settled(backend: str, call: Call) -> Support:
    support = choose(call) if backend == "auto" else check(backend, call)
    if not support.ok:
        raise ValueError(f"The {support.backend} attention backend cannot run this call: {support.reason}.")
    return support


@block_sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    full_counts: Tensor,
    test_table: Tensor | None,
    test_lookup: Tensor | None,
    test_kind: int,
    test_numbers: Sequence[int],
    block_q: int,
    block_kv: int,
    scale: float,
    backend: str,
    k_mean: Tensor | None = None,
    v_sum: Tensor | None = None,
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("dit_accel::block_sparse_attention_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
@in_full_precision
def block_sparse_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, need_q: bool, need_kv: bool, *arguments: Any
) -> tuple[Tensor, ...]:
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
        `(grad_q, grad_k, grad_v, grad_k_mean, grad_v_sum)`, contiguous, in the shapes and dtypes of what they belong
        to; undefined where not asked for, the last two empty without a residual.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    q, k, v, *lists, scale, backend = arguments[:-_MEANS]
    plan, residual = _plan(q, k, *lists), _residual(*arguments[-_MEANS:])
    inputs = BackwardInputs(q, k, v, out, lse, grad_out, grad_lse, need_q, need_kv)
    chosen = _settled(backend, _call(q, k, v, plan, residual)).family
    grads = _listed_gradients(chosen, inputs, plan, scale)
    if residual is None:
        return *grads, q.new_empty(0), q.new_empty(0)
    # The log-sum-exp is that of listed keys and mean keys together, so both parts of the softmax stand on their own.
    used = rounded(residual, q.dtype) if chosen == "triton" else residual
    grad_q, grad_k_mean, grad_v_sum = centroid_backward(inputs, used, plan, scale)
    return (grad_q + grads[0]).to(q.dtype), *grads[1:], grad_k_mean, grad_v_sum


def _listed_gradients(chosen: str, inputs: BackwardInputs, plan: SparsePlan, scale: float) -> Gradients:
    if chosen == "reference":
        return reference_backward(inputs, plan, scale)
    # The gradients ask for out and lse only, not for how they came about.
    if chosen in ("gather", "xformers"):
        return gather_backward(inputs, plan, scale)
    from .triton_kernels.backward import triton_backward

    return triton_backward(inputs, plan, scale)


@block_sparse_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, need_q: bool, need_kv: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    q, k, v = arguments[:3]
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    means = arguments[-_MEANS:-1]
    return *grads, *(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in means)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # Runs only if a gradient will be asked for; without, nothing is kept.
    means, backend = inputs[-_MEANS:], inputs[-_MEANS - 1]
    if backend == "flex":
        raise NotImplementedError(
            "The flex attention backend has no backward pass, but q, k or v requires a gradient. "
            "Use backend='auto', 'triton' or 'gather', or run under torch.no_grad()."
        )
    ctx.numbers = inputs[_TENSORS:-_MEANS]
    ctx.save_for_backward(*inputs[:_TENSORS], *means, *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, k_mean, v_sum, sizes, out, lse = ctx.saved_tensors
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    means = (k_mean, v_sum, sizes)
    grads = block_sparse_attention_backward(
        grad_out, grad_lse, out, lse, need_q, need_k or need_v, *tensors, *ctx.numbers, *means
    )
    needed = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[-_MEANS:-1])
    found = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return *found[:3], *(None,) * (len(tensors) - 3 + len(ctx.numbers)), *found[3:], None


torch.library.register_autograd("dit_accel::block_sparse_attention", _differentiate, setup_context=_save)
