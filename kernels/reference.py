"""Dense attention under the plan's expanded mask, in float32.  Slow and simple: the answer all backends must match."""

from __future__ import annotations

import torch
from torch import Tensor

from .permute import inverse_order
from .residual import Residual
from .residual_attention import Centroids
from .sparse_plan import SparsePlan


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float, residual: Residual | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `softmax(scale * q k^T + mask) v` with every score held in memory, one head at a time.

    Args:
        q: `[B, H, q_len, D]`.
        k: `[B, H, kv_len, D]`.
        v: `[B, H, kv_len, D]`.
        plan: Who attends to whom.  Its `order` is respected here too.
        scale: Factor on the scores.
        residual: What blocks that are not listed contribute, or None: their means become further keys and values.

    Returns:
        `(out, lse)`: out in the dtype and shape of q; lse float32 `[B, H, q_len]`, natural log.  A query without any
        key gets out 0 and lse -inf.
    """
    batch, heads = q.shape[:2]
    mask = plan.element_mask().expand(batch, heads, -1, -1)
    bias = torch.zeros(k.shape[2], dtype=torch.float32, device=k.device)
    if residual is not None:
        centroids = Centroids.of(residual)
        k, v = torch.cat((k.float(), centroids.keys), 2), torch.cat((v.float(), centroids.values), 2)
        mask = torch.cat((mask, _unlisted(plan).expand(batch, heads, -1, -1)), -1)
        bias = torch.cat((bias, centroids.log_sizes))
    out = q.new_zeros(q.shape)
    lse = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    for b in range(batch):
        for h in range(heads):
            scores = q[b, h].float() @ k[b, h].float().transpose(0, 1) * scale + bias
            scores.masked_fill_(~mask[b, h], float("-inf"))
            lse[b, h] = scores.logsumexp(-1)
            # An empty row is all -inf and softmax turns it into NaN; its weights are zero by definition.
            weights = scores.softmax(-1).masked_fill_(~mask[b, h], 0.0)
            out[b, h] = (weights @ v[b, h].float()).to(q.dtype)
    return out, lse


def _unlisted(plan: SparsePlan) -> Tensor:
    """Bool `[B|1, H|1, q_len, NK]`: blocks that a query's row does not list, queries in the ORIGINAL token order."""
    unlisted = ~plan.to_bool()
    rows = torch.arange(plan.q_len, device=plan.device) // plan.block_q
    if plan.order is None:
        return unlisted[:, :, rows]
    rows = rows[inverse_order(plan.order)]
    if rows.ndim == 1:
        return unlisted[:, :, rows]
    lead = torch.broadcast_shapes(unlisted.shape[:2], rows.shape[:2])
    return unlisted.expand(*lead, -1, -1).gather(2, rows[..., None].expand(*lead, -1, unlisted.shape[-1]))
