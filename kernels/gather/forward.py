"""Sparse attention out of stock torch parts: gather the listed key blocks of each row, then run dense attention.

Rows that list the same number of blocks are stacked into one dense call, so no time goes into padding.  Works on any
device; on the CPU, where torch's flash attention returns the log-sum-exp as well, it beats dense attention by nearly
the sparsity (see benchmarks/cpu.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sparse_plan import SparsePlan

# Gathered keys and values of one dense call, in bytes.  A chunk that stays in the CPU caches is fastest; a GPU wants
# larger calls.
_CHUNK_BYTES = {"cpu": 4 << 20, "other": 256 << 20}
# Scores of one dense call where they are held in memory (no fused kernel with log-sum-exp), in bytes.
_SCORE_BYTES = 256 << 20


@dataclass(frozen=True)
class _Blocked:
    """q, k, v, out and lse cut into plan blocks; the leading axis runs over (batch, head, block)."""

    q: Tensor  # [B*H*NQ, block_q, D]
    k: Tensor  # [B*H*NK, block_kv * D]
    v: Tensor  # [B*H*NK, block_kv * D]
    out: Tensor  # [B*H*NQ, block_q, D]
    lse: Tensor  # [B*H*NQ, block_q]


def gather_attention(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attends under `plan` by gathering key blocks.

    Args:
        q: `[B, H, q_len, D]`, any strides.
        k: `[B, H, kv_len, D]`.
        v: `[B, H, kv_len, D]`.
        plan: Who attends to whom, in plan positions (`order` is the caller's business).
        scale: Factor on the scores.

    Returns:
        `(out, lse)`: out in the dtype and shape of q; lse float32 `[B, H, q_len]`, natural log.  A query without any
        key gets out 0 and lse -inf.
    """
    batch, heads, _, dim = q.shape
    rows = plan.num_q_blocks
    # One blocked copy costs a few percent of the attention and makes each listed block one contiguous run of memory,
    # whatever strides the caller has.
    data = _Blocked(
        q=_cut(q, plan.block_q).view(-1, plan.block_q, dim),
        k=_cut(k, plan.block_kv).view(-1, plan.block_kv * dim),
        v=_cut(v, plan.block_kv).view(-1, plan.block_kv * dim),
        out=q.new_empty(batch * heads * rows, plan.block_q, dim),
        lse=torch.empty(batch * heads * rows, plan.block_q, dtype=torch.float32, device=q.device),
    )
    counts = plan.counts.expand(batch, heads, rows)
    listed_full = counts if plan.pair_test is None else plan.full_counts.expand(batch, heads, rows)
    empty, whole = counts == 0, (counts > 0) & (listed_full == counts)
    _fill_empty(empty.reshape(-1), data)
    _attend_whole_rows(whole, counts, data, plan, scale)
    if plan.pair_test is not None:
        _attend_cut_rows(data, plan, scale, batch, heads)
    out = data.out.view(batch, heads, rows * plan.block_q, dim)[:, :, : plan.q_len]
    lse = data.lse.view(batch, heads, rows * plan.block_q)[:, :, : plan.q_len]
    return out.contiguous(), lse.contiguous()


def _cut(x: Tensor, block: int) -> Tensor:
    """Copies `[B, H, S, D]` to a contiguous `[B, H, blocks * block, D]`, zeros behind the end."""
    length = x.shape[2]
    short = -length % block
    if not short:
        return x.contiguous()
    out = x.new_zeros(x.shape[0], x.shape[1], length + short, x.shape[3])
    out[:, :, :length] = x
    return out


def _fill_empty(empty: Tensor, data: _Blocked) -> None:
    rows = empty.nonzero()[:, 0]
    data.out.index_fill_(0, rows, 0.0)
    data.lse.index_fill_(0, rows, float("-inf"))


def _attend_whole_rows(whole: Tensor, counts: Tensor, data: _Blocked, plan: SparsePlan, scale: float) -> None:
    """Handles the rows that list FULL blocks only: no element mask anywhere."""
    batch, heads, rows = counts.shape
    last = plan.num_kv_blocks - 1
    counts = counts.long()
    indices = plan.indices.expand(batch, heads, rows, -1)
    if plan.kv_len % plan.block_kv:
        final = indices.gather(-1, (counts - 1).clamp(min=0)[..., None])[..., 0]
        short = (final == last) & (counts > 0)
    else:
        short = torch.zeros_like(whole)
    # Rows are grouped by (count, lists the short block); ascending lists put the short block at the end.
    group = torch.where(whole, counts * 2 + short, -1).reshape(-1)
    order = torch.argsort(group, stable=True)
    keys, sizes = torch.unique_consecutive(group[order], return_counts=True)
    flat, begin = indices.reshape(-1, indices.shape[-1]), 0
    for key, size in zip(keys.tolist(), sizes.tolist(), strict=True):
        members = order[begin : begin + size]
        begin += size
        if key >= 0:
            cut = -plan.kv_len % plan.block_kv if key % 2 else 0
            _attend_group(members, key // 2, cut, flat, data, plan, scale)


def _attend_group(
    members: Tensor, count: int, cut: int, indices: Tensor, data: _Blocked, plan: SparsePlan, scale: float
) -> None:
    """Runs rows `members`, which list `count` blocks each; the last `cut` gathered keys do not exist."""
    keys, dim = count * plan.block_kv, data.q.shape[-1]
    step = _rows_per_call(data.q, keys * dim * 2, plan.block_q * keys)
    # Fresh memory for every call would cost as much in page faults as the gathering itself.
    held = min(step, members.numel()) * count
    k_held, v_held = (x.new_empty(held, x.shape[1]) for x in (data.k, data.v))
    for begin in range(0, members.numel(), step):
        rows = members[begin : begin + step]
        base = torch.div(rows, plan.num_q_blocks, rounding_mode="floor") * plan.num_kv_blocks
        blocks = (indices[rows, :count] + base[:, None]).reshape(-1)
        k, v = (
            torch.index_select(x, 0, blocks, out=out[: blocks.numel()]).view(rows.numel(), keys, dim)[:, : keys - cut]
            for x, out in ((data.k, k_held), (data.v, v_held))
        )
        out, lse = dense_attention(data.q.index_select(0, rows), k, v, scale)
        data.out.index_copy_(0, rows, out)
        data.lse.index_copy_(0, rows, lse)


def _attend_cut_rows(data: _Blocked, plan: SparsePlan, scale: float, batch: int, heads: int) -> None:
    """Handles the rows with PARTIAL blocks.  A mask is built once per plan row and used by all heads that share it."""
    plan_batch, plan_heads = plan.counts.shape[:2]
    grid = torch.arange(batch * heads, device=data.q.device).view(batch, heads)
    for b, h, row, count, whole in cut_rows(plan):
        owners = grid if plan_batch == 1 else grid[b : b + 1]
        owners = owners if plan_heads == 1 else owners[:, h : h + 1]
        blocks = plan.indices[b, h, row, :count].long()
        keep = _row_mask(plan, (b, h, row), blocks, whole)
        _attend_masked(owners.reshape(-1), row, blocks, keep, data, plan, scale)


def cut_rows(plan: SparsePlan) -> list[list[int]]:
    """Rows with PARTIAL blocks: batch, head and row, how many blocks are listed, and how many of them are FULL.

    Waits for the device twice, however many rows there are.
    """
    mixed = (plan.full_counts < plan.counts).nonzero()
    places = mixed.unbind(-1)
    numbers = torch.stack((plan.counts[places], plan.full_counts[places]), -1)
    rows: list[list[int]] = torch.cat((mixed, numbers), -1).tolist()
    return rows


def _row_mask(plan: SparsePlan, place: tuple[int, int, int], blocks: Tensor, whole: int) -> Tensor:
    """Mask `[block_q, count * block_kv]` of row `place` (batch, head, row) of the plan, which lists `blocks`.

    Cut at the end of the keys everywhere, and by the pair test behind the first `whole` blocks.
    """
    kv = (blocks[:, None] * plan.block_kv + torch.arange(plan.block_kv, device=blocks.device)).reshape(-1)
    keep = (kv < plan.kv_len).repeat(plan.block_q, 1)
    if plan.pair_test is not None:
        batch, head, row = place
        q = torch.arange(row * plan.block_q, (row + 1) * plan.block_q, device=blocks.device)
        tested = slice(whole * plan.block_kv, None)
        # Tests look things up by position, so they are never asked about tokens that do not exist.
        known_q, known_kv = q.clamp(max=plan.q_len - 1), kv[tested].clamp(max=plan.kv_len - 1)
        keep[:, tested] &= plan.pair_test.keeps_in(batch, head, known_q[:, None], known_kv[None])
    return keep


def _attend_masked(
    owners: Tensor, row: int, blocks: Tensor, keep: Tensor, data: _Blocked, plan: SparsePlan, scale: float
) -> None:
    """Runs one plan row for the (batch, head) pairs `owners`, all under the same element mask."""
    keys, dim = blocks.numel() * plan.block_kv, data.q.shape[-1]
    bias = torch.zeros(keep.shape, dtype=data.q.dtype, device=keep.device).masked_fill_(~keep, float("-inf"))
    dead = ~keep.any(-1)
    step = _rows_per_call(data.q, keys * dim * 2, plan.block_q * keys)
    for begin in range(0, owners.numel(), step):
        some = owners[begin : begin + step]
        listed = (some[:, None] * plan.num_kv_blocks + blocks).reshape(-1)
        k = data.k.index_select(0, listed).view(some.numel(), keys, dim)
        v = data.v.index_select(0, listed).view(some.numel(), keys, dim)
        rows = some * plan.num_q_blocks + row
        out, lse = dense_attention(data.q.index_select(0, rows), k, v, scale, bias)
        # Releases differ in what they return for a query whose keys are all masked.
        data.out.index_copy_(0, rows, out.masked_fill(dead[:, None], 0.0))
        data.lse.index_copy_(0, rows, lse.masked_fill(dead, float("-inf")))


def _rows_per_call(q: Tensor, gathered: int, scores: int) -> int:
    if _has_fused_lse(q.device):
        threads = torch.get_num_threads()
        return max(1, threads * _CHUNK_BYTES["cpu"] // (gathered * q.element_size()))
    return max(1, min(_CHUNK_BYTES["other"] // (gathered * q.element_size()), _SCORE_BYTES // (scores * 4)))


def _has_fused_lse(device: torch.device) -> bool:
    """Whether torch has a flash kernel here that returns the log-sum-exp and takes a mask."""
    return device.type == "cpu"


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dense attention with log-sum-exp for a stack of independent rows.

    Args:
        q: `[N, M, D]`.
        k: `[N, L, D]`.
        v: `[N, L, D]`.
        scale: Factor on the scores.
        bias: None or `[M, L]` in q's dtype, added to the scaled scores of every row of the stack.

    Returns:
        `(out [N, M, D] in q's dtype, lse [N, M] float32)`.
    """
    if _has_fused_lse(q.device):
        mask = None if bias is None else bias[None, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], attn_mask=mask, scale=scale
        )
        return out[0], lse[0]
    scores = torch.bmm(q.float(), k.float().transpose(1, 2)).mul_(scale)
    if bias is not None:
        scores += bias
    lse = scores.logsumexp(-1)
    out = torch.bmm(torch.softmax(scores, -1).to(v.dtype), v)
    return out, lse
