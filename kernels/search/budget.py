"""How many blocks each head keeps, by their exact mass: AdaSpa's levels (arXiv 2502.21079), or a wanted recall.

Text is outside the budget: blocks that hold any are kept, and what is counted here are the others.  Every row of a
head keeps the same number of them, so that rows cost alike, unless the recall of single rows is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .running import running_sum
from .select import select_topk

GOOD_RECALL = 0.8  # heads that hold more of their mass than this can spare blocks for others


@dataclass(frozen=True)
class MassBudget:
    """How many blocks to keep: a density with three levels of heads, or the fewest that reach a recall.

    `select_mass` takes other counts than the density's beside it, as tensors that compiled code does not depend on.

    Attributes:
        density: Part of the blocks without text that a row keeps, above 0 to 1, rounded up.  For recall unused.
        levels: Whether heads whose recall is above 0.8 give half of their blocks to as many heads with the least.
        recall: Part of the mass to keep, above 0 to 1, or None for a budget by density.
        recall_over: Whether each "row" of blocks reaches the recall, or each "head" as a whole, with as many blocks in
            every row.
        min_density: Part of the blocks without text that a row keeps at least under a recall, one block at least.
        max_density: Part that it keeps at most, even if it does not reach the recall.

    Raises:
        ValueError: Numbers outside their ranges, or unknown words.
    """

    density: float = 0.2
    levels: bool = True
    recall: float | None = None
    recall_over: Literal["row", "head"] = "row"
    min_density: float = 0.02
    max_density: float = 1.0

    def __post_init__(self) -> None:
        for name in ("density", "recall", "max_density"):
            value = getattr(self, name)
            if not (name == "recall" and value is None) and not (_is_number(value) and 0 < value <= 1):
                raise ValueError(f"{name} is a part in (0, 1], such as 0.9 or 0.2; got {value!r}")
        if not _is_number(self.min_density) or not 0 <= self.min_density <= self.max_density:
            raise ValueError(f"min_density lies in [0, max_density={self.max_density}]; got {self.min_density!r}")
        if self.recall_over not in ("row", "head"):
            raise ValueError(f"recall_over is 'row' or 'head'; got {self.recall_over!r}")

    def most(self, blocks: int) -> int:
        """Blocks without text that a row keeps at most, of so many."""
        if self.recall is not None:
            return _part(self.max_density, blocks)
        base = _part(self.density, blocks)
        return base + _shift(base, blocks) if self.levels else base


def select_mass(
    mass: Tensor, budget: MassBudget, *, always: Tensor, sinks: int, counts: Tensor | None = None
) -> Tensor:
    """Keeps the blocks with the most mass, as many as the budget allows each row.

    Args:
        mass: `[B, H, rows, cols]`, as from `block_mass`; rows need not sum to their queries.
        budget: How many.
        always: bool `[rows, cols]`: kept beside the budget; whole columns and whole rows.
        sinks: How many columns `always` keeps whole.
        counts: int64 `[H or 1, 1]`, from 1 to the blocks without text: what a row keeps of them before heads are told
            apart by levels, instead of the density's part.

    Returns:
        bool, shape of `mass`.
    """
    free = mass.shape[-1] - sinks
    # An outdated log-sum-exp can make weights overflow; infinite ones would make sums and parts of them NaN.
    mass = mass.clamp(max=torch.finfo(mass.dtype).max)
    if free == 0:
        return torch.ones_like(mass, dtype=torch.bool)
    if budget.recall is not None:
        kept = _recall_counts(mass, budget, always, free)
    else:
        kept = _density_counts(mass, budget, always, sinks, free, counts)
    return select_topk(mass, sinks + kept, always=always)


def head_recall(mass: Tensor, kept: Tensor) -> Tensor:
    """Part of the mass of each head that is kept, float64 `[B, H]`."""
    mass = mass.double()
    return (mass * kept).sum((-2, -1)) / mass.sum((-2, -1)).clamp(min=torch.finfo(mass.dtype).tiny)


def head_shifts(recall: Tensor) -> Tensor:
    """The level of each head: -1 keeps fewer blocks, 1 keeps more; they sum to 0.

    With n heads above the recall of 0.8, the n best ones give and the n worst ones take, at most half of all each.
    Equal heads rank in their order.

    Args:
        recall: `[B, H]`, each batch item by itself.

    Returns:
        int64 `[B, H]`.
    """
    heads = recall.shape[-1]
    giving = (recall > GOOD_RECALL).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank >= heads - giving).long() - (rank < giving).long()


def _density_counts(
    mass: Tensor, budget: MassBudget, always: Tensor, sinks: int, free: int, counts: Tensor | None
) -> Tensor:
    """int64 `[B, H, 1]`: blocks of each row besides the sinks."""
    if counts is None:
        counts = torch.full((1, 1), _part(budget.density, free), dtype=torch.int64, device=mass.device)
    counts = counts.expand(*mass.shape[:2], 1)
    if not budget.levels:
        return counts
    recall = head_recall(mass, select_topk(mass, sinks + counts, always=always))
    return counts + torch.minimum(counts // 2, free - counts) * head_shifts(recall)[..., None]


def _recall_counts(mass: Tensor, budget: MassBudget, always: Tensor, free: int) -> Tensor:
    """int64 `[B, H, rows or 1]`: the fewest blocks besides the sinks that reach the recall, within the bounds."""
    mass = mass.double()
    best = mass.masked_fill(always, 0).sort(-1, descending=True).values[..., :free]
    sunk = (mass * always).sum(-1, keepdim=True)
    held = torch.cat((sunk, sunk + running_sum(best)), -1)  # by 0, 1, ... blocks
    total = mass.sum(-1, keepdim=True)
    if budget.recall_over == "head":
        held, total = held.sum(-2, keepdim=True), total.sum(-2, keepdim=True)
    assert budget.recall is not None
    needed = (held < budget.recall * total).sum(-1)
    return needed.clamp(_part(budget.min_density, free), _part(budget.max_density, free))


def _part(density: float, blocks: int) -> int:
    """So many blocks are a density; at least one."""
    return max(1, math.ceil(density * blocks - 1e-9))


def _shift(base: int, blocks: int) -> int:
    """Blocks that a giving head spares: sparsity S becomes (1 + S) / 2 there, and (3 S - 1) / 2 where they go.

    At less than a third of sparsity that would be more than all, so less is given.
    """
    return min(base // 2, blocks - base)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
