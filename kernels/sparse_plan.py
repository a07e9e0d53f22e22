"""The one description of "who attends to whom" that every sparse method writes and every kernel reads.

A plan cuts queries and keys into blocks and lists, for each query block, the key blocks it looks at.  Lists are padded
rows rather than CSR, so a kernel reaches any row with one stride and a plan shared by all heads or all batch items is
a dimension of size 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .bitmap import Bitmap
from .pair_tests import Neighborhood, PairTest, block_area
from .permute import inverse_order


@dataclass(frozen=True)
class PlanStats:
    """What a plan costs, counted when it was built.

    Attributes:
        density: Kept (query, key) pairs over all pairs, exact (short last blocks and the pair test included).
        density_per_head: The same for each head (averaged over the batch); one entry if all heads share a row.
        method: Name of the method that built the plan.
        details: Settings worth reporting (rule, decay, ...).
    """

    density: float
    density_per_head: tuple[float, ...]
    method: str = "custom"
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SparsePlan:
    """Immutable block lists for one attention call.  Build it with `plan_from_blocks`.

    Attributes:
        q_len: Query tokens.
        kv_len: Key tokens.  The last block may be short; kernels mask it by length.
        block_q: Queries per block.
        block_kv: Keys per block.
        indices: int32 `[B|1, H|1, NQ, K]`, key blocks of each row: FULL ones ascending, PARTIAL ones ascending, zeros.
        counts: int32 `[B|1, H|1, NQ]`, listed blocks of each row.
        full_counts: int32, same shape, how many of them are FULL (no element test).
        stats: Density and origin.
        pair_test: Element test of the PARTIAL blocks, for plan positions.  None: every listed block is FULL, and
            `full_counts` becomes `counts` itself, with all blocks of a row ascending.
        order: int64 `[N]`, or `[B|1, H|1, N]` where heads differ, or None.  Plan position p holds token
            `order[..., p]`; for queries, and for keys unless these have an order of their own.
        kv_order: int64 `[kv_len]` or `[B|1, H|1, kv_len]`, likewise for keys alone.  None: that of the queries.
        always_q: Query ranges `(start, stop)` that see everything.  They are in the lists already; for reports.
        always_kv: Key ranges that everyone sees, likewise.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    indices: Tensor
    counts: Tensor
    full_counts: Tensor
    stats: PlanStats
    pair_test: PairTest | None = None
    order: Tensor | None = None
    always_q: tuple[tuple[int, int], ...] = ()
    always_kv: tuple[tuple[int, int], ...] = ()
    kv_order: Tensor | None = None

    def __post_init__(self) -> None:
        _check_lengths(self.q_len, self.kv_len, self.block_q, self.block_kv)
        _check_lists(self)
        _check_orders(self)
        _check_ranges("always_q", self.always_q, self.q_len)
        _check_ranges("always_kv", self.always_kv, self.kv_len)
        if self.pair_test is not None:
            _check_pair_test(self, self.pair_test)
        elif self.full_counts is not self.counts:
            self._list_all_as_full()

    def _list_all_as_full(self) -> None:
        """Makes blocks FULL that a pair test once made PARTIAL: they ascend with the others, a short one at the end.

        Backends cut the last listed block of a row where the keys end, and no other.
        """
        used = torch.arange(self.indices.shape[-1], device=self.device) < self.counts[..., None]
        ordered = torch.where(used, self.indices, self.num_kv_blocks).sort(dim=-1).values
        object.__setattr__(self, "indices", torch.where(used, ordered, 0))
        object.__setattr__(self, "full_counts", self.counts)

    @property
    def num_q_blocks(self) -> int:
        """Rows of the block lists, NQ."""
        return -(-self.q_len // self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        """Key blocks, NK."""
        return -(-self.kv_len // self.block_kv)

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.indices.device

    @property
    def key_order(self) -> Tensor | None:
        """In which order the keys stand, `kv_order` or `order`; None: in their own."""
        return self.order if self.kv_order is None else self.kv_order

    @property
    def density(self) -> float:
        """Kept pairs over all pairs, `stats.density`."""
        return self.stats.density

    @property
    def nbytes(self) -> int:
        """Bytes held by the plan's tensors."""
        tensors = [self.indices, self.counts, self.full_counts, self.order, self.kv_order]
        tensors += [] if self.pair_test is None else self.pair_test.tensors()
        unique = {id(t): t for t in tensors if t is not None}
        return sum(t.numel() * t.element_size() for t in unique.values())

    def to(self, device: torch.device | str) -> SparsePlan:
        """Copies the plan to `device`; returns itself if it is there already."""
        if torch.device(device) == self.device:
            return self
        counts = self.counts.to(device)
        return replace(
            self,
            indices=self.indices.to(device),
            counts=counts,
            full_counts=counts if self.full_counts is self.counts else self.full_counts.to(device),
            pair_test=None if self.pair_test is None else self.pair_test.to(device),
            order=None if self.order is None else self.order.to(device),
            kv_order=None if self.kv_order is None else self.kv_order.to(device),
        )

    def to_bool(self, *, full_only: bool = False) -> Tensor:
        """Expands the lists into a block mask.

        Args:
            full_only: Mark the FULL blocks only.

        Returns:
            bool `[B|1, H|1, NQ, NK]`, in plan positions.
        """
        counts = self.full_counts if full_only and self.pair_test is not None else self.counts
        slots = torch.arange(self.indices.shape[-1], device=self.device)
        # Padding entries go to a spare column, which is cut off again.
        target = torch.where(slots < counts[..., None], self.indices, self.num_kv_blocks).long()
        mask = torch.zeros(*counts.shape, self.num_kv_blocks + 1, dtype=torch.bool, device=self.device)
        return mask.scatter_(-1, target, True)[..., :-1]

    def element_mask(self) -> Tensor:
        """Expands the plan to single (query, key) pairs: the definition that tests and the reference use.

        Returns:
            bool `[B|1, H|1, q_len, kv_len]` in the ORIGINAL token order.  Needs `q_len * kv_len` bytes per head.
        """
        mask = self._expand(self.to_bool())
        if self.pair_test is not None:
            q = torch.arange(self.q_len, device=self.device)[:, None]
            kv = torch.arange(self.kv_len, device=self.device)[None, :]
            mask &= self._expand(self.to_bool(full_only=True)) | self.pair_test.keeps(q, kv)
        if self.order is not None:
            mask = _in_token_order(mask, self.order)
        if self.key_order is not None:
            mask = _in_token_order(mask.transpose(-1, -2), self.key_order).transpose(-1, -2)
        return mask

    def _expand(self, blocks: Tensor) -> Tensor:
        rows = blocks.repeat_interleave(self.block_q, -2)[..., : self.q_len, :]
        return rows.repeat_interleave(self.block_kv, -1)[..., : self.kv_len]


def plan_from_blocks(
    keep: Tensor,
    *,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    partial: Tensor | None = None,
    pair_test: PairTest | None = None,
    order: Tensor | None = None,
    kv_order: Tensor | None = None,
    always_q: Sequence[tuple[int, int]] = (),
    always_kv: Sequence[tuple[int, int]] = (),
    method: str = "custom",
    details: Mapping[str, Any] | None = None,
) -> SparsePlan:
    """Builds a plan from a block mask and counts its density exactly.

    Reads a few numbers back from the device (list capacity, density); build plans outside the hot loop.

    Args:
        keep: bool `[B|1, H|1, NQ, NK]` or `[NQ, NK]`, key blocks that each query block looks at.
        q_len: Query tokens.
        kv_len: Key tokens.
        block_q: Queries per block.
        block_kv: Keys per block.
        partial: bool, same shape as `keep` (or `[NQ, NK]`): kept blocks in which the test is applied to every
            pair.  With a test and no `partial`, the blocks it cuts are found here and those it empties are dropped.
        pair_test: Element test of the partial blocks, for plan positions.  A `Neighborhood` without `raster` is given
            the one of `order`, so it sees the tokens where they stand on the grid.
        order: int64 token permutation, see `SparsePlan.order`.
        kv_order: That of the keys, if it is another, see `SparsePlan.kv_order`.
        always_q: Query ranges that see everything, for reports.
        always_kv: Key ranges that everyone sees, for reports.
        method: Name of the method.
        details: Settings worth reporting.

    Returns:
        The plan, on the device of `keep`.

    Raises:
        ValueError: Wrong shapes or dtypes, `partial` without a test, or a partial block that is not kept.
    """
    _check_lengths(q_len, kv_len, block_q, block_kv)
    rows, cols = -(-q_len // block_q), -(-kv_len // block_kv)
    keep = _as_block_mask("keep", keep, rows, cols)
    sizes = (q_len, kv_len, block_q, block_kv)
    pairs = None
    if pair_test is not None:
        pair_test = pair_test.to(keep.device)
        if isinstance(pair_test, Neighborhood) and order is not None:
            _check_shared_order(order, kv_order)
            pair_test = pair_test.in_order(order)
        if isinstance(pair_test, Bitmap):
            # Heads that share a row of blocks may still differ inside them.
            lead = (n if m == 1 else m for m, n in zip(keep.shape[:2], pair_test.slots.shape[:2], strict=True))
            keep = keep.expand(*lead, -1, -1)
        pair_test.check_fit(*sizes, (keep.shape[0], keep.shape[1]))
        pairs = pair_test.pairs_per_block(*sizes).expand_as(keep)
    area = block_area(*sizes, keep.device)
    if partial is not None:
        partial = _as_block_mask("partial", partial, rows, cols).to(keep.device).expand_as(keep)
        _check_partial(partial, keep, pair_test)
    elif pairs is not None:
        partial, keep = keep & (pairs > 0) & (pairs < area), keep & (pairs > 0)
    per_head = _density_per_head(keep, partial, area, pairs) / (q_len * kv_len)
    indices, counts, full_counts = _lists(keep, partial)
    heads = tuple(per_head.tolist())
    return SparsePlan(
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        indices=indices,
        counts=counts,
        full_counts=full_counts,
        stats=PlanStats(sum(heads) / len(heads), heads, method, dict(details or {})),
        pair_test=pair_test,
        order=order,
        kv_order=kv_order,
        always_q=tuple((int(a), int(b)) for a, b in always_q),
        always_kv=tuple((int(a), int(b)) for a, b in always_kv),
    )


def _lists(keep: Tensor, partial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rank = (~keep).to(torch.uint8) * 2
    if partial is not None:
        rank += partial
    counts = keep.sum(-1, dtype=torch.int32)
    full_counts = counts if partial is None else counts - partial.sum(-1, dtype=torch.int32)
    capacity = max(1, int(counts.max()))
    # A stable sort by (full, partial, absent) leaves the ids ascending within each group.
    indices = torch.argsort(rank, dim=-1, stable=True)[..., :capacity].to(torch.int32)
    slots = torch.arange(capacity, device=keep.device)
    return torch.where(slots < counts[..., None], indices, 0), counts, full_counts


def _density_per_head(keep: Tensor, partial: Tensor | None, area: Tensor, pairs: Tensor | None) -> Tensor:
    """Kept pairs per head, averaged over the batch, float64 `[H|1]`; one head at a time to bound memory."""
    totals = torch.zeros(keep.shape[:2], dtype=torch.float64, device=keep.device)
    for b in range(keep.shape[0]):
        for h in range(keep.shape[1]):
            kept = area if partial is None or pairs is None else torch.where(partial[b, h], pairs[b, h], area)
            totals[b, h] = torch.where(keep[b, h], kept, 0).sum()
    return totals.mean(0)


def _as_block_mask(name: str, mask: Tensor, rows: int, cols: int) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor, got {mask.dtype}. Compare against a threshold first.")
    if mask.ndim not in (2, 4) or tuple(mask.shape[-2:]) != (rows, cols) or 0 in mask.shape:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; these lengths and blocks need [{rows}, {cols}] "
            f"or [batch or 1, heads or 1, {rows}, {cols}]."
        )
    return mask if mask.ndim == 4 else mask[None, None]


def _check_partial(partial: Tensor, keep: Tensor, pair_test: PairTest | None) -> None:
    if pair_test is None:
        raise ValueError(
            "partial blocks need a pair test that says which pairs to keep. Pass pair_test=, or drop partial=."
        )
    if bool((partial & ~keep).any()):
        raise ValueError("partial marks blocks that keep does not. Every partial block must be a kept block.")


def _check_lengths(q_len: int, kv_len: int, block_q: int, block_kv: int) -> None:
    for name, value in (("q_len", q_len), ("kv_len", kv_len), ("block_q", block_q), ("block_kv", block_kv)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _check_lists(plan: SparsePlan) -> None:
    indices, rows = plan.indices, plan.num_q_blocks
    if indices.ndim != 4 or indices.shape[2] != rows or 0 in indices.shape:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)}; {plan.q_len} queries in blocks of {plan.block_q} "
            f"need [batch or 1, heads or 1, {rows}, capacity]."
        )
    for name, tensor in (("counts", plan.counts), ("full_counts", plan.full_counts)):
        if tensor.shape != indices.shape[:-1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(indices.shape[:-1])}.")
    for name, tensor in (("indices", indices), ("counts", plan.counts), ("full_counts", plan.full_counts)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {tensor.dtype}. Convert it with .to(torch.int32).")
        if tensor.device != indices.device:
            raise ValueError(f"{name} is on {tensor.device}, indices on {indices.device}. Put all lists together.")


def _check_pair_test(plan: SparsePlan, test: PairTest) -> None:
    for tensor in test.tensors():
        if tensor.device != plan.device:
            raise ValueError(
                f"The pair test is on {tensor.device}, the lists are on {plan.device}. "
                "Move the plan with SparsePlan.to(device)."
            )
    lead = (plan.indices.shape[0], plan.indices.shape[1])
    test.check_fit(plan.q_len, plan.kv_len, plan.block_q, plan.block_kv, lead)


def _in_token_order(mask: Tensor, order: Tensor) -> Tensor:
    """Moves rows of `[B|1, H|1, N, M]` from plan positions to the tokens that `order` puts there."""
    position = inverse_order(order)
    if order.ndim == 1:
        return mask[..., position, :]
    lead = torch.broadcast_shapes(mask.shape[:2], order.shape[:2])
    return mask.expand(*lead, -1, -1).gather(2, position[..., None].expand(*lead, -1, mask.shape[-1]))


def _check_orders(plan: SparsePlan) -> None:
    if plan.order is not None and plan.kv_order is None and plan.q_len != plan.kv_len:
        raise ValueError(
            f"order permutes queries and keys alike, but q_len is {plan.q_len} and kv_len is {plan.kv_len}. Give keys "
            "an order of their own, kv_order."
        )
    for name, order, length in (("order", plan.order, plan.q_len), ("kv_order", plan.kv_order, plan.kv_len)):
        if order is not None:
            _check_order(name, order, length, plan)


def _check_order(name: str, order: Tensor, length: int, plan: SparsePlan) -> None:
    if order.dtype != torch.int64 or order.ndim not in (1, 3) or order.shape[-1] != length or 0 in order.shape:
        raise ValueError(
            f"{name} must be int64 of shape ({length},), or (batch or 1, heads or 1, {length}), got {order.dtype} of "
            f"{tuple(order.shape)}."
        )
    if any(1 not in (n, m) and n != m for n, m in zip(order.shape[:-1], plan.indices.shape[:2], strict=False)):
        raise ValueError(
            f"{name} is for {tuple(order.shape[:2])} batch items and heads, the lists are for "
            f"{tuple(plan.indices.shape[:2])}. Give one of them for all, or both for as many."
        )
    if order.device != plan.device:
        raise ValueError(f"{name} is on {order.device}, the lists are on {plan.device}. Put them together.")


def _check_shared_order(order: Tensor, kv_order: Tensor | None) -> None:
    if order.ndim != 1 or kv_order is not None:
        raise ValueError(
            "A Neighborhood knows where tokens stand on the grid from one order of all heads, for queries and keys "
            "alike. Give an order of shape (tokens,) and no kv_order, or say the mask as a Bitmap."
        )


def _check_ranges(name: str, ranges: tuple[tuple[int, int], ...], length: int) -> None:
    for start, stop in ranges:
        if not 0 <= start <= stop <= length:
            raise ValueError(f"{name} holds ({start}, {stop}), which is not a range within [0, {length}].")
