"""Block-sparse flash attention in Triton: launches the backward pass.

The formulas are those of `kernels/backward.py`, the kernels those of `backward_kernels.py`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..backward import BackwardInputs, Gradients
from ..invert import invert_lists
from ..sparse_plan import SparsePlan
from .backward_config import DELTA_TILE, BackwardConfig, backward_config, backward_constants, delta_constants
from .backward_kernels import delta_kernel, dkv_kernel, dq_kernel
from .forward_config import forward_precision
from .generation import capability_of
from .pair_tests import predicate, test_arguments

_LOG2_E = 1.4426950408889634


def triton_backward(inputs: BackwardInputs, plan: SparsePlan, scale: float) -> Gradients:
    """Launches the kernels.

    Args:
        inputs: Tensors of the forward pass and incoming gradients; last strides of q, k and v are 1.
        plan: Who attends to whom, in plan positions; blocks are multiples of 16.
        scale: Positive factor on the scores.

    Returns:
        `(grad_q, grad_k, grad_v)`, contiguous, in the dtype of q; undefined where not asked for.
    """
    q = inputs.q
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(inputs.k.shape, dtype=q.dtype, device=q.device)
    grad_v = torch.empty(inputs.k.shape, dtype=q.dtype, device=q.device)
    with torch.cuda.device(q.device) if q.device.type == "cuda" else contextlib.nullcontext():
        launch = _Launch.of(inputs, plan, scale, capability_of(q.device))
        if inputs.need_q:
            launch.dq(grad_q)
        if inputs.need_kv:
            launch.dkv(grad_k, grad_v)
    return grad_q, grad_k, grad_v


@dataclass(frozen=True, eq=False)
class _Launch:
    """What both kernels are launched with."""

    inputs: BackwardInputs
    grad_out: Tensor
    delta: Tensor
    plan: SparsePlan
    scale: float
    capability: tuple[int, int] | None

    @classmethod
    def of(cls, inputs: BackwardInputs, plan: SparsePlan, scale: float, capability: tuple[int, int] | None) -> _Launch:
        # Sums and means send gradients with stride 0; anything with a contiguous head dimension is read in place.
        grad_out = inputs.grad_out if inputs.grad_out.stride(-1) == 1 else inputs.grad_out.contiguous()
        out, lse, grad_lse = inputs.out, inputs.lse.contiguous(), inputs.grad_lse.contiguous()
        batch, heads, q_len, head_dim = out.shape
        delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
        delta_kernel[(triton.cdiv(q_len, DELTA_TILE), batch * heads)](
            out,
            grad_out,
            grad_lse,
            lse,
            delta,
            *out.stride()[:3],
            *grad_out.stride()[:3],
            heads,
            q_len,
            **delta_constants(head_dim),
            num_warps=4,
        )
        return cls(inputs, grad_out, delta, plan, scale, capability)

    def dq(self, grad_q: Tensor) -> None:
        """Fills `grad_q`."""
        plan, batch, heads = self.plan, *grad_q.shape[:2]
        indices = plan.indices.contiguous().expand(batch, heads, -1, -1)
        counts = plan.counts.contiguous().expand(batch, heads, -1)
        full_counts = plan.full_counts.contiguous().expand(batch, heads, -1)
        config, constants = self._configuration("dq", plan.kv_len % plan.block_kv != 0)
        test_tensors, test_numbers = test_arguments(plan.pair_test, plan.counts)
        dq_kernel[(plan.num_q_blocks * (plan.block_q // config.tile_m), batch * heads)](
            *self._tensors(),
            grad_q,
            self.inputs.lse.contiguous(),
            self.delta,
            indices,
            counts,
            full_counts,
            *test_tensors,
            *self._scales_and_strides(),
            *indices.stride()[:3],
            *counts.stride()[:2],
            *self._lengths(),
            *test_numbers,
            **constants,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    def dkv(self, grad_k: Tensor, grad_v: Tensor) -> None:
        """Fills `grad_k` and `grad_v`."""
        plan, batch, heads = self.plan, *grad_k.shape[:2]
        full_counts = plan.counts if plan.pair_test is None else plan.full_counts
        columns = invert_lists(plan.indices, plan.counts, full_counts, plan.num_kv_blocks)
        rows, bounds = (t.expand(batch, heads, -1) for t in (columns.rows, columns.bounds))
        config, constants = self._configuration("dkv", plan.q_len % plan.block_q != 0)
        test_tensors, test_numbers = test_arguments(plan.pair_test, plan.counts)
        dkv_kernel[(plan.num_kv_blocks * (plan.block_kv // config.tile_n), batch * heads)](
            *self._tensors(),
            grad_k,
            grad_v,
            self.inputs.lse.contiguous(),
            self.delta,
            rows,
            bounds,
            *test_tensors,
            *self._scales_and_strides(),
            *rows.stride()[:2],
            *bounds.stride()[:2],
            *self._lengths(),
            *test_numbers,
            **constants,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    def _configuration(self, kernel: str, short_tail: bool) -> tuple[BackwardConfig, dict[str, int | bool | str]]:
        plan, q = self.plan, self.inputs.q
        config = backward_config(kernel, self.capability, q.element_size(), q.shape[-1], plan.block_q, plan.block_kv)
        constants = backward_constants(
            config,
            head_dim=q.shape[-1],
            block_q=plan.block_q,
            block_kv=plan.block_kv,
            short_tail=short_tail,
            predicate=predicate(plan.pair_test),
            precision=forward_precision(q.dtype == torch.float32, self.capability),
        )
        return config, constants

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.inputs.q, self.inputs.k, self.inputs.v, self.grad_out

    def _scales_and_strides(self) -> tuple[float | int, ...]:
        strides = (stride for t in self._tensors() for stride in t.stride()[:3])
        return self.scale, self.scale * _LOG2_E, *strides

    def _lengths(self) -> tuple[int, ...]:
        return self.inputs.q.shape[1], self.plan.q_len, self.plan.kv_len
