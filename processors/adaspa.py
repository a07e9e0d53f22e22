"""AdaSpa (Xia et al., ICCV 2025, arXiv 2502.21079): blocks by their exact mass, looked for twice in a generation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..kernels.search.budget import MassBudget
from ..kernels.search.budget_plan import mass_plan, touched_blocks
from ..kernels.search.pooled import differentiable_means
from ..plan.schedule import step_index
from .base import DynamicAttnProcessor
from .budget import block_counts, count_tensor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..kernels.search.always import Ranges
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule
    from .base import Memory

DENSITY = 0.2
WARM_UP = 0.2  # 10 of 50 steps; the eleventh searches first
AGAIN = (0.6,)  # at step 30 of 50


class Setup(NamedTuple):
    """What a search needs besides queries and keys.

    Attributes:
        text: tokens that see everything and are seen by all.
        blocks: blocks without text, of which the budget is a part.
        device: where the call runs.
        counts: blocks that a row keeps of them, int64 ``[heads or 1, 1]``; None for the part that the density says.
    """

    text: Ranges
    blocks: int
    device: torch.device
    counts: torch.Tensor | None = None


class AdaSpaAttnProcessor(DynamicAttnProcessor):
    """Sparse attention over the blocks that hold the most of the softmax, which hardly change from step to step.

    After the dense steps every site searches during a call that is still dense, and follows what it found. At the
    later searches the mass of blocks is taken with the log-sum-exp of the first one, in one pass over the scores
    instead of two, and the call follows the new blocks. Text tokens see everything and are seen by all, beside the
    budget; blocks that hold both text and image count as text. In every row of a head the same number of blocks is
    kept. An expert that comes in later searches first, dense, too. The defaults are the published ones.

    Beyond the paper: a budget by recall instead of density, and searches whenever queries or keys have drifted.

    Args:
        density: part of the blocks that a row keeps, in (0, 1]; 0.2 by default. Heads that hold more than 0.8 of
            their mass keep half of it, as many others that hold the least keep half as much again.
        levels: whether heads differ in that way.
        recall: instead of a density: part of the softmax that the kept blocks hold at the search, in (0, 1].
        recall_over: who reaches it, every ``"row"`` of blocks by itself or every ``"head"``, with rows alike.
        min_density: part of the blocks that a row keeps at least under a recall.
        max_density: part that it keeps at most, even if that is too little for the recall.
        search_again: steps of the later searches: a float is a fraction of all steps, rounded up, an int a step
            counted from 0.
        drift: searches anew, at all sites together, if at one of them the mean query or key vectors of blocks have
            turned so far that their cosine with those of the last search is below ``1 - drift``, in (0, 2). It is
            measured at every call that follows a plan and looked at before the next step, which waits for the device
            there. A mean over the batch, so a batch may search at other steps than its items alone. None: never.
        cache_lse: whether later searches use the log-sum-exp of the first, for 4 bytes per head and token at every
            site and branch.
        block: tokens per block of queries and of keys, 64 or 128.
        compensate: whether blocks that are left out still count by their means.
        dense_steps: sampling steps that stay dense, besides the one of the first search.
        dense_layers: layers that stay dense; none by default.
        schedule: instead of these two; its budgets are factors on the density, and not for a recall. Levels are then
            those of the scaled density; where a factor changes, all sites search once more.
        backend: kernel backend.

    Raises:
        ValueError: for settings outside these, or budgets beside a recall.
    """

    dense_first = True
    remembers = True
    usual_dense_steps = WARM_UP
    scales_budget = True

    def __init__(
        self,
        *,
        density: float | None = None,
        levels: bool = True,
        recall: float | None = None,
        recall_over: Literal["row", "head"] = "row",
        min_density: float = 0.02,
        max_density: float = 1.0,
        search_again: Sequence[int | float] = AGAIN,
        drift: float | None = None,
        cache_lse: bool = True,
        block: int = 64,
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
        if density is not None and recall is not None:
            raise ValueError(f"density={density} and recall={recall} are two budgets; give one of them")
        if recall is not None:
            self.refuse_budgets("a recall says by itself how many blocks are kept; use a density")
        if block not in (64, 128):
            raise ValueError(f"AdaSpa works on blocks of 64 or 128 tokens; got {block}")
        if drift is not None and not (_is_number(drift) and 0 < drift < 2):
            raise ValueError(f"drift is a distance of cosines in (0, 2), such as 0.1, or None; got {drift!r}")
        self.density, self.recall = density if density is not None or recall is not None else DENSITY, recall
        self.budget = MassBudget(
            DENSITY if self.density is None else self.density, levels, recall, recall_over, min_density, max_density
        )
        self.search_again = tuple(_checked(step) for step in _sequence(search_again))
        self.drift, self.measures = drift, drift is not None
        self.cache_lse, self.block = cache_lse, block

    def renews(self, site: SiteInfo, state: StepState) -> bool:
        """At the steps given for it; the first search needs no saying."""
        return any(state.step == step_index("search_again", step, state.steps) for step in self.search_again)

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Setup:
        """Where the text is, and how many blocks there are without any.

        Raises:
            ValueError: if there are padding tokens, which must not be scored.
        """
        if layout.padding:
            raise ValueError(f"AdaSpa cannot tell {layout.padding} padding tokens from others; leave them out")
        text = (layout.text,) if layout.text else ()
        blocks = -(-layout.length // self.block)
        return Setup(text, blocks - touched_blocks(text, self.block), device)

    def at_step(self, setup: Setup, site: SiteInfo, state: StepState) -> Setup:
        """How many blocks the schedule lets the site keep at a step, if it has budgets."""
        if self.density is None or not self.schedule.has_budgets:
            return setup
        counts = block_counts(float(self.density), setup.blocks, self.budget_factors(site, state))
        return setup._replace(counts=count_tensor(counts, setup.device))

    def find_plan(self, query: torch.Tensor, key: torch.Tensor, setup: Setup, *, scale: float | None) -> SparsePlan:
        """A first search; see :func:`mass_plan`."""
        return self.search(query, key, setup, None, scale=scale)[0]

    def search(
        self, query: torch.Tensor, key: torch.Tensor, setup: Setup, memory: Memory | None, *, scale: float | None
    ) -> tuple[SparsePlan, Memory]:
        """Finds a plan, and remembers the log-sum-exp and the mean vectors, as far as they are wanted."""
        q, k = query.transpose(1, 2), key.transpose(1, 2)
        lse = memory[-1] if self.cache_lse and memory is not None else None
        options: dict[str, Any] = {"block": self.block, "budget": self.budget, "text": setup.text}
        plan, lse = mass_plan(q, k, lse=lse, counts=setup.counts, scale=scale, **options)
        means = (self._means(query), self._means(key)) if self.measures else ()
        return plan, (*means, lse) if self.cache_lse else means

    def measure(self, query: torch.Tensor, key: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Cosine of mean vectors with those of the last search, the lesser one of queries and keys."""
        now = (self._means(query), self._means(key))
        pairs = zip(now, memory[:2], strict=True)
        return torch.stack([torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]).amin()

    def has_drifted(self, measures: torch.Tensor) -> bool:
        """Whether one of the sites is too far from its last search."""
        assert self.drift is not None  # else nothing is measured
        return float(measures.min()) < 1 - self.drift

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        plain = ("density", "recall", "search_again", "drift", "cache_lse", "block", "compensate", "backend")
        of_budget = ("levels", "recall_over", "min_density", "max_density")
        return {name: getattr(self.budget, name) for name in of_budget} | self.plain_settings(*plain)

    def _means(self, x: torch.Tensor) -> torch.Tensor:
        """Mean vectors of all blocks of a head in a row, float32 ``[batch, heads, blocks * head_dim]``."""
        return differentiable_means(x.detach().transpose(1, 2), self.block).flatten(2)


def _sequence(search_again: object) -> tuple[Any, ...]:
    if isinstance(search_again, (int, float, str)) or not isinstance(search_again, Collection):
        raise ValueError(f"search_again is a list of steps, such as [0.6] or [20, 30]; got {search_again!r}")
    return tuple(search_again)


def _checked(step: Any) -> int | float:
    if not _is_number(step) or step < 0 or (isinstance(step, float) and step >= 1):
        raise ValueError(f"search_again holds steps from 0 (30) or fractions of all in [0, 1) (0.6); got {step!r}")
    number: int | float = step
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
