"""The attention call as one torch operator, so that torch.compile sees a single opaque node.

The operator takes tensors and numbers only.  Which backend runs is settled inside it, at run time, and two plans of
the same shapes share one compiled graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gather import gather_attention
from .reference import reference_attention
from .sparse_plan import Band, PlanStats, SparsePlan
from .support import Call, check, choose

_UNCOUNTED = PlanStats(density=float("nan"), density_per_head=(), method="operator")


# Spelled out, since older torch releases do not read postponed annotations such as `Tensor | None`.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, Tensor full_counts, Tensor? widths, int block_q, "
    "int block_kv, int frame_tokens, int video_len, int sink_tokens, float scale, str backend) -> (Tensor, Tensor)"
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
    band = None if widths is None else Band(frame_tokens, widths, video_len, sink_tokens)
    plan = SparsePlan(q.shape[2], k.shape[2], block_q, block_kv, indices, counts, full_counts, _UNCOUNTED, band)
    call = Call.of(q, k, v, block_q, block_kv)
    support = choose(call) if backend == "auto" else check(backend, call)
    if not support.ok:
        raise ValueError(f"The {support.backend} attention backend cannot run this call: {support.reason}.")
    if support.backend == "reference":
        return reference_attention(q, k, v, plan, scale)
    if support.backend == "gather":
        return gather_attention(q, k, v, plan, scale)
    # Triton takes a moment to import and is missing on many CPU installs.
    from .triton_forward import triton_attention

    return triton_attention(q, k, v, plan, scale)


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
