"""The plan run by xformers' dense attention on gathered blocks, for those who already depend on xformers.

xformers has no attention under a block mask.  So the FULL blocks of each row are gathered and rows with equally many
are stacked into one dense call; the PARTIAL blocks of a row go through a second call with an additive bias; and the
two are merged by their log-sum-exp.  Exact, but every listed block is copied first: no speed is promised, and "auto"
never chooses this backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gather.forward import _row_mask, cut_rows
from ..merge import merge_attention
from ..sparse_plan import SparsePlan

# Gathered keys and values of one call, in bytes.
_CHUNK_BYTES = 256 << 20
# Rows of one call; CUDA launches at most 65,535 of them along one axis.
_CHUNK_ROWS = 32768
# xformers wants strides of a bias in multiples of 16 bytes.
_BIAS_BYTES = 16


@dataclass(frozen=True, eq=False)
class _Blocked:
    """Tensors cut into plan blocks; the leading axis runs over (batch, head, block)."""

    q: Tensor  # [B*H*NQ, block_q, D]
    k: Tensor  # [B*H*NK, block_kv * D]
    v: Tensor  # [B*H*NK, block_kv * D]
    out: Tensor  # [B*H*NQ, block_q, D]
    lse: Tensor  # [B*H*NQ, block_q]


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attends under `plan` by gathering key blocks for xformers' dense attention.

    Args:
        q: `[B, H, q_len, D]`, any strides.
        k: `[B, H, kv_len, D]`.
        v: `[B, H, kv_len, D]`.
        plan: Who attends to whom, in plan positions (`order` is the caller's business).  Partial blocks need a bias.
        scale: Factor on the scores.

    Returns:
        `(out, lse)`: out contiguous in the dtype and shape of q; lse float32 `[B, H, q_len]`, natural log.  A query
        without any key gets out 0 and lse -inf.
    """
    batch, heads, _, dim = q.shape
    rows = plan.num_q_blocks
    data = _Blocked(
        q=_cut(q, plan.block_q).view(-1, plan.block_q, dim),
        k=_cut(k, plan.block_kv).view(-1, plan.block_kv * dim),
        v=_cut(v, plan.block_kv).view(-1, plan.block_kv * dim),
        out=q.new_zeros(batch * heads * rows, plan.block_q, dim),
        lse=torch.full((batch * heads * rows, plan.block_q), float("-inf"), dtype=torch.float32, device=q.device),
    )
    _attend_full_blocks(data, plan, batch, heads, scale)
    if plan.pair_test is not None:
        _merge_partial_blocks(data, plan, batch, heads, scale)
    out = data.out.view(batch, heads, rows * plan.block_q, dim)[:, :, : plan.q_len]
    lse = data.lse.view(batch, heads, rows * plan.block_q)[:, :, : plan.q_len]
    return out.contiguous(), lse.contiguous()


def _cut(x: Tensor, block: int) -> Tensor:
    """Copies `[B, H, S, D]` to `[B, H, blocks * block, D]`, zeros behind the end."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block)).contiguous()


def _attend_full_blocks(data: _Blocked, plan: SparsePlan, batch: int, heads: int, scale: float) -> None:
    counts = plan.counts if plan.pair_test is None else plan.full_counts
    counts = counts.expand(batch, heads, -1).reshape(-1).long()
    indices = plan.indices.expand(batch, heads, -1, -1).reshape(counts.numel(), -1)
    # Ascending lists put the short last block at the end, where a slice removes what it lacks.
    final = indices.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    missing = -plan.kv_len % plan.block_kv
    keys = counts * plan.block_kv - torch.where(final == plan.num_kv_blocks - 1, missing, 0)
    keys = torch.where(counts > 0, keys, 0)
    for length in keys.unique().tolist():
        if length == 0:
            continue
        count = -(-length // plan.block_kv)
        for rows in _chunks((keys == length).nonzero()[:, 0], count, data, plan):
            out, lse = _dense(data, rows, indices[rows, :count].long(), plan, scale, length)
            data.out.index_copy_(0, rows, out)
            data.lse.index_copy_(0, rows, lse)


def _merge_partial_blocks(data: _Blocked, plan: SparsePlan, batch: int, heads: int, scale: float) -> None:
    """One bias per row of the plan; all (batch, head) pairs that share the row use it."""
    plan_batch, plan_heads = plan.counts.shape[:2]
    owners = torch.arange(batch * heads, device=data.q.device).view(batch, heads)
    for b, h, row, last, first in cut_rows(plan):
        blocks = plan.indices[b, h, row, first:last].long()
        keep = _row_mask(plan, (b, h, row), blocks, 0)
        bias, dead = _bias(keep, data.q.dtype), ~keep.any(-1)
        sharing = owners[slice(None) if plan_batch == 1 else slice(b, b + 1)]
        sharing = sharing[:, slice(None) if plan_heads == 1 else slice(h, h + 1)].reshape(-1)
        for rows in _chunks(sharing * plan.num_q_blocks + row, last - first, data, plan):
            out, lse = _dense(data, rows, blocks.expand(len(rows), -1), plan, scale, bias=bias)
            # Operators differ in what they give a query whose keys are all hidden; the merge ignores it behind -inf.
            parts = data.out[rows][None], out[None]
            lses = data.lse[rows][None], lse.masked_fill(dead, float("-inf"))[None]
            merged, merged_lse = merge_attention(parts, lses)
            data.out.index_copy_(0, rows, merged[0])
            data.lse.index_copy_(0, rows, merged_lse[0])


def _bias(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """`keep` as an additive bias whose rows begin at aligned addresses."""
    step = _BIAS_BYTES // dtype.itemsize
    wide = torch.zeros(keep.shape[0], -(-keep.shape[1] // step) * step, dtype=dtype, device=keep.device)
    return wide[:, : keep.shape[1]].masked_fill_(~keep, float("-inf"))


def _chunks(rows: Tensor, count: int, data: _Blocked, plan: SparsePlan) -> Sequence[Tensor]:
    gathered = 2 * count * plan.block_kv * data.q.shape[-1] * data.q.element_size()
    return rows.split(max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // gathered)))


def _dense(
    data: _Blocked,
    rows: Tensor,
    blocks: Tensor,
    plan: SparsePlan,
    scale: float,
    length: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention of `rows` to the key blocks `[n, count]`, the first `length` keys of them.

    Returns:
        `(out [n, block_q, D], lse [n, block_q])`.
    """
    import xformers.ops as xops

    owner = torch.div(rows, plan.num_q_blocks, rounding_mode="floor") * plan.num_kv_blocks
    listed = (blocks + owner[:, None]).reshape(-1)
    # Rows are xformers' batch, [batch, tokens, heads, dim] with a single head.
    shape = len(rows), -1, 1, data.q.shape[-1]
    k, v = (t.index_select(0, listed).view(shape)[:, :length] for t in (data.k, data.v))
    mask = None if bias is None else bias.expand(len(rows), 1, -1, -1)
    q = data.q.index_select(0, rows)[:, :, None]
    out, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias=mask, scale=scale)
    # Some operators pad the log-sum-exp.
    return out[:, :, 0], lse[:, 0, : plan.block_q].float()
