"""Block routing: every block of queries looks at the blocks of keys that score best for it.

What BiFormer (Zhu et al., CVPR 2023, arXiv 2303.08810), SpargeAttn (Zhang et al., ICML 2025, arXiv 2502.18137) and
DraftAttention have in common: means of blocks stand for blocks, and a rule of selection says how many are kept. Scores
by sub-blocks follow the aim of XAttention (arXiv 2503.16428), to see strong pairs that drown in the mean of a block.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..kernels.search.plan import dynamic_plan
from .base import DynamicAttnProcessor, check_search_every
from .budget import block_counts, count_tensor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..families import Family
    from ..kernels.search.always import Ranges
    from ..kernels.search.plan import Keep, Score
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule

SCORES: dict[str, Score] = {"pooled": "pooled", "sub_block": "lse", "mass": "mass"}
RULES: dict[str, Keep] = {"top_k": "topk", "top_p": "topp", "threshold": "threshold"}
USUAL_AMOUNT = {"top_k": 0.25, "top_p": 0.9, "threshold": 1.0}


class Setup(NamedTuple):
    """What a search needs besides queries and keys.

    Attributes:
        always_q: queries that see everything.
        always_kv: keys that everyone sees.
        blocks: blocks of keys.
        device: where the call runs.
        counts: blocks that a row keeps, int64 ``[heads or 1, 1]``; None for the method's own amount.
    """

    always_q: Ranges
    always_kv: Ranges
    blocks: int
    device: torch.device
    counts: torch.Tensor | None = None


class BlockRoutingAttnProcessor(DynamicAttnProcessor):
    """Sparse attention over the blocks that score best, found from the queries and keys of the call.

    Text tokens see everything and are seen by all. Blocks that hold both text and image count as text.

    Args:
        score: what a block is judged by: ``"pooled"``, its mean query and mean key; ``"sub_block"``, the same for
            quarters of blocks, put together by log-sum-exp; ``"mass"``, its exact softmax mass, at about half the cost
            of dense attention or more, so search seldom.
        select: ``"top_k"``, as many blocks for every row; ``"top_p"``, the fewest that hold a part of the row's mass;
            ``"threshold"``, those that hold enough of it.
        amount: for ``"top_k"`` the part of all blocks in (0, 1], or an int, their number; for ``"top_p"`` the part of
            the mass in (0, 1]; for ``"threshold"`` a multiple of the mean mass of the row's blocks, above 0. By
            default 0.25, 0.9 and 1.
        block: tokens per block of queries and of keys, 64 or 128.
        search_every: sampling steps from one search to the next, counted from the first sparse step.
        head_shared: whether all heads share one list, by the mean of their scores (not for ``"mass"``).
        first_frame: whether every query sees the whole first frame.
        compensate: whether blocks that are left out still count by their means.
        dense_steps: sampling steps that stay dense; 12 of 50 by default, hence the fraction 0.24.
        dense_layers: layers that stay dense; by default the first.
        schedule: instead of these two; its budgets are factors on the amount, for ``"top_k"`` only.
        backend: kernel backend.

    Raises:
        ValueError: for settings outside these, or budgets that the rule of selection leaves no room for.
    """

    usual_dense_layers = 1
    scales_budget = True

    def __init__(
        self,
        *,
        score: Literal["pooled", "sub_block", "mass"] = "pooled",
        select: Literal["top_k", "top_p", "threshold"] = "top_k",
        amount: float | None = None,
        block: int = 128,
        search_every: int = 1,
        head_shared: bool = False,
        first_frame: bool = False,
        compensate: bool = False,
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
        _check_names(score, select, block)
        self.score, self.select, self.block = score, select, block
        self.amount = USUAL_AMOUNT[select] if amount is None else amount
        self.search_every, self.head_shared, self.first_frame = search_every, head_shared, first_frame
        _check_amount(select, self.amount)
        check_search_every(search_every)
        if select != "top_k":
            self.refuse_budgets(f"select={select!r} says by itself how many blocks are kept; use select='top_k'")
        if head_shared:
            self.refuse_head_budgets("with head_shared all heads have one list; use step_budget or layer_budget")
        if head_shared and score == "mass":
            raise ValueError(
                "head_shared takes means of scores, which say nothing of mass; use 'pooled' or 'sub_block'"
            )

    def check_family(self, family: Family) -> None:
        """Refuses to keep the first frame of models that make only one."""
        super().check_family(family)
        if self.first_frame and not family.makes_video:
            raise ValueError(f"first_frame keeps everything in {family.root_class}, which makes single images")

    def renews(self, site: SiteInfo, state: StepState) -> bool:
        """Every so many steps, counted from the first that is not dense."""
        return (state.step - self.schedule.dense_step_count(state.steps)) % self.search_every == 0

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Setup:
        """Queries that see everything, keys that everyone sees, and how many blocks there are.

        Raises:
            ValueError: if there are padding tokens, which must not be scored, or the first frame is spread out.
        """
        if layout.padding:
            raise ValueError(f"block routing cannot tell {layout.padding} padding tokens from others; leave them out")
        if self.first_frame and layout.order is not None:
            raise ValueError("first_frame keeps blocks that lie together, and a token permutation spreads them out")
        text = (layout.text,) if layout.text else ()
        start = layout.visual[0]
        frame = ((start, start + layout.frame_tokens),) if self.first_frame else ()
        return Setup(text, text + frame, -(-layout.length // self.block), device)

    def at_step(self, setup: Setup, site: SiteInfo, state: StepState) -> Setup:
        """How many blocks the schedule lets the site keep at a step, if it has budgets."""
        if not self.schedule.has_budgets:
            return setup
        counts = block_counts(self.amount, setup.blocks, self.budget_factors(site, state))
        return setup._replace(counts=count_tensor(counts, setup.device))

    def find_plan(self, query: torch.Tensor, key: torch.Tensor, setup: Setup, *, scale: float | None) -> SparsePlan:
        """Scores the blocks, selects, and lists what is kept; see :func:`dynamic_plan`."""
        q, k = query.transpose(1, 2), key.transpose(1, 2)
        if self.head_shared:  # the product of all heads side by side is the sum of their products
            scale = (query.shape[-1] ** -0.5 if scale is None else scale) / query.shape[1]
            q, k = q.flatten(2)[:, :, None], k.flatten(2)[:, :, None]
        amount = self.amount if setup.counts is None else setup.counts
        if self.select == "threshold":  # blocks of a row hold 1 / columns of its mass on average
            amount /= -(-key.shape[2] // self.block)
        return dynamic_plan(
            q,
            k,
            block_q=self.block,
            block_kv=self.block,
            score=SCORES[self.score],
            keep=RULES[self.select],
            amount=amount,
            always_q=setup.always_q,
            always_kv=setup.always_kv,
            scale=scale,
        )

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        names = ("score", "select", "amount", "block", "search_every", "head_shared", "first_frame", "compensate")
        return self.plain_settings(*names, "backend")


def _check_names(score: str, select: str, block: int) -> None:
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; choose one of {', '.join(SCORES)}")
    if select not in RULES:
        raise ValueError(f"unknown rule of selection {select!r}; choose one of {', '.join(RULES)}")
    if block not in (64, 128):
        raise ValueError(f"block routing works on blocks of 64 or 128 tokens; got {block}")


def _check_amount(select: str, amount: float) -> None:
    """Refuses amounts outside the range of the rule."""
    number = isinstance(amount, (int, float)) and not isinstance(amount, bool) and math.isfinite(amount)
    if select == "top_k":
        fits = number and (0 < amount <= 1 if isinstance(amount, float) else amount >= 1)
        valid = "a density in (0, 1], such as 0.25, or a whole number of blocks from 1"
    elif select == "top_p":
        fits, valid = number and 0 < amount <= 1, "the part of the mass to keep, in (0, 1], such as 0.9"
    else:
        fits, valid = number and amount > 0, "a multiple of the mean mass of a block, above 0, such as 1"
    if not fits:
        raise ValueError(f"amount for select={select!r} is {valid}; got {amount!r}")
