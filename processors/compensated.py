"""Exact attention where it matters, block means for all the rest, in one softmax.

Sol-Attn (arXiv 2607.24027), after PISA (arXiv 2602.01077): blocks whose score stands out among those of their row are
attended to key by key. Every other block still counts, as one key: its mean, weighed by its number of keys, with the
mean of its values. So nothing is dropped, at the price of one score per query and block.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..kernels.search.plan import dynamic_plan
from ..kernels.token_order import inverse_order, morton_order, with_text
from .base import DynamicAttnProcessor, check_search_every
from .budget import block_counts, count_tensor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..kernels.search.always import Ranges
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule

TAU = 1.0
WARM_UP = 0.2  # 10 of 50 steps; published guards are 8 to 10, and the first layer


class Setup(NamedTuple):
    """What a search needs besides queries and keys.

    Attributes:
        order: int64 ``[tokens]``, in which blocks are cut; None for the order that the tokens have.
        text: queries that see everything, and keys that everyone sees.
        blocks: blocks of keys.
        device: where the call runs.
        counts: exact blocks of a row, int64 ``[heads or 1, 1]``; None for the method's own rule.
    """

    order: torch.Tensor | None
    text: Ranges
    blocks: int
    device: torch.device
    counts: torch.Tensor | None = None


class CompensatedAttnProcessor(DynamicAttnProcessor):
    """Sparse attention that leaves nothing out: a few blocks exactly, all others by their means.

    Exact are the blocks that the rule chooses, and all pairs with a text query or a text key. Blocks that hold both
    text and image count as text.

    Args:
        tau: a block is exact if the mean score of its keys exceeds that of the row's blocks by so many standard
            deviations; 1 by default. Of Gaussian scores 1, 1.5 and 2 keep about 16, 7 and 2.3 %; what it keeps of
            others, the report says. The row's own block and the ones beside it are exact as well.
        variance: how the standard deviation is found: ``"exact"``, from the row's scores; ``"diag"`` (the default),
            from the spread of the mean keys, dimension by dimension.
        density: instead of tau: the part of all blocks that every row keeps, those with the best mean scores, in
            (0, 1]. Text counts, and stays even where it is more.
        morton: whether blocks are cut along Morton's curve through the video instead of the sequence, so that their
            tokens are close in space and time. Every call then permutes its tokens, unless a
            :class:`dit_accel.install.TokenPermutation` by the same order has done so for all of them.
        block: tokens per block of queries and of keys, 64 or 128.
        search_every: sampling steps from one choice of blocks to the next, counted from the first sparse step. Means
            are those of the call in any case.
        compensate: whether the other blocks count at all; False leaves the plain sparse attention, for comparison.
        dense_steps: sampling steps that stay dense; 10 of 50 by default, hence the fraction 0.2.
        dense_layers: layers that stay dense; by default the first.
        schedule: instead of these two; its budgets are factors on the density, which then has to be given.
        backend: kernel backend.

    Raises:
        ValueError: for settings outside these, or budgets without a density.
    """

    usual_dense_steps = WARM_UP
    usual_dense_layers = 1
    scales_budget = True

    def __init__(
        self,
        *,
        tau: float | None = None,
        variance: Literal["diag", "exact"] | None = None,
        density: float | None = None,
        morton: bool = False,
        block: int = 64,
        search_every: int = 1,
        compensate: bool = True,
        dense_steps: int | float | None = None,
        dense_layers: int | Collection[int] | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            compensate=compensate,
            dense_steps=dense_steps,
            dense_layers=dense_layers,
            schedule=schedule,
            backend=backend,
        )
        _check_rule(tau, variance, density)
        if block not in (64, 128):
            raise ValueError(f"compensated attention works on blocks of 64 or 128 tokens; got {block!r}")
        if not isinstance(morton, bool):
            raise ValueError(f"morton is True or False; got {morton!r}")
        check_search_every(search_every)
        by_threshold = density is None
        if by_threshold:
            self.refuse_budgets("tau says by itself how many blocks are exact; give a density instead, such as 0.1")
        self.tau = (TAU if tau is None else tau) if by_threshold else None
        self.variance = (variance or "diag") if by_threshold else None
        self.density = None if density is None else float(density)
        self.morton, self.block, self.search_every = morton, block, search_every

    def renews(self, site: SiteInfo, state: StepState) -> bool:
        """Every so many steps, counted from the first that is not dense."""
        return (state.step - self.schedule.dense_step_count(state.steps)) % self.search_every == 0

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Setup:
        """The order of the blocks, and where the text is.

        Raises:
            ValueError: if there are padding tokens, which would count in the means.
        """
        if layout.padding:
            raise ValueError(
                f"compensated attention cannot tell {layout.padding} padding tokens from others; leave them out"
            )
        order = _morton_order(layout, device) if self.morton else None
        text = (layout.text,) if layout.text else ()
        return Setup(order, text, -(-layout.length // self.block), device)

    def at_step(self, setup: Setup, site: SiteInfo, state: StepState) -> Setup:
        """How many blocks the schedule lets the site have exact at a step, if it has budgets."""
        if self.density is None or not self.schedule.has_budgets:
            return setup
        counts = block_counts(self.density, setup.blocks, self.budget_factors(site, state))
        return setup._replace(counts=count_tensor(counts, setup.device))

    def find_plan(self, query: torch.Tensor, key: torch.Tensor, setup: Setup, *, scale: float | None) -> SparsePlan:
        """Chooses the exact blocks; see :func:`dynamic_plan`."""
        if setup.order is not None:
            query, key = query.index_select(2, setup.order), key.index_select(2, setup.order)
        plan = dynamic_plan(
            query.transpose(1, 2),
            key.transpose(1, 2),
            block_q=self.block,
            block_kv=self.block,
            always_q=setup.text,
            always_kv=setup.text,
            scale=scale,
            **self._rule(setup),
        )
        return plan if setup.order is None else replace(plan, order=setup.order)

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        names = ("tau", "variance", "density", "morton", "block", "search_every", "compensate", "backend")
        return self.plain_settings(*names)

    def _rule(self, setup: Setup) -> dict[str, Any]:
        """Which blocks are exact, as arguments of :func:`dynamic_plan`."""
        if self.density is not None:
            return {"keep": "topk", "amount": self.density if setup.counts is None else setup.counts}
        return {"keep": "gaussian", "amount": self.tau, "variance": self.variance}


def _morton_order(layout: TokenLayout, device: torch.device) -> torch.Tensor | None:
    """Morton's curve through the video for tokens as they come; None if they come that way already."""
    start, stop = layout.visual
    order = with_text(morton_order(layout.grid, device), before=start, after=layout.length - stop)
    if layout.order is None:
        return order
    order = inverse_order(layout.order.to(device))[order]
    if torch.equal(order, torch.arange(order.numel(), device=device)):
        return None
    warnings.warn(
        "dit_accel: morton=True inside a token permutation by another order permutes the tokens of every call again; "
        "give TokenPermutation the Morton order, or leave one of them out",
        stacklevel=2,
    )
    return order


def _check_rule(tau: float | None, variance: str | None, density: float | None) -> None:
    if density is not None and (tau is not None or variance is not None):
        raise ValueError("tau and variance choose blocks by a threshold, density by their number; give one of them")
    if tau is not None and not (_is_number(tau) and math.isfinite(tau)):
        raise ValueError(f"tau is a number of standard deviations, such as 1; got {tau!r}")
    if variance not in (None, "diag", "exact"):
        raise ValueError(f"unknown variance {variance!r}; choose 'diag' or 'exact'")
    if density is not None and not (_is_number(density) and 0 < density <= 1):
        raise ValueError(f"density is the part of all blocks to keep, in (0, 1], such as 0.1; got {density!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
