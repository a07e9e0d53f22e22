"""Sparse VideoGen 2 (Yang et al., NeurIPS 2025, arXiv 2505.18875): tokens sorted by meaning instead of place.

K-means groups the queries and the keys of each head. Sorted by their clusters, tokens that attend alike lie side by
side, so whole blocks are worth keeping or leaving out, and centroids tell which.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..kernels.cluster.plan import ClusterRule, cluster_plan
from .base import DynamicAttnProcessor, check_search_every
from .budget import block_counts, count_tensor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule
    from .base import Memory

TOP_P = 0.9
MIN_KC_RATIO = 0.1
BOUNDARIES = ("keep", "exact")
BLOCKS = (16, 32, 64, 128)
TOKENS = 75600  # of Wan at 720p, for which the numbers of clusters are published
Q_CLUSTERS, K_CLUSTERS = 300, 1000
FEWEST_QUERIES, FEWEST_KEYS = 48, 24  # a cluster of shorter videos holds on average, measured on shapes-wan


class Setup(NamedTuple):
    """What a search needs besides queries and keys.

    Attributes:
        text: range of the text tokens; empty if there are none.
        tokens: all tokens.
        device: where the call runs.
        counts: what the schedule lets each head keep, int64 ``[heads or 1, 1]``; None for ``top_p``.
    """

    text: tuple[int, int]
    tokens: int
    device: torch.device
    counts: torch.Tensor | None = None


class ClusterAttnProcessor(DynamicAttnProcessor):
    """Sparse attention between clusters of queries and clusters of keys, each head with its own.

    The first search of a generation runs k-means for long, later ones for a few rounds from the centroids of the one
    before. Text tokens see everything, are seen by all, and are in no cluster; those of reference images are clustered
    with the rest.

    Args:
        top_p: a cluster of queries chooses the clusters of keys with the greatest mass, as estimated by centroids,
            until they hold this part of it, in (0, 1]; 0.9 by default.
        min_kc_ratio: part of the clusters of keys that it chooses at least, in [0, 1]; 0.1 by default.
        density: instead of these two: the part of all blocks that every row keeps, those with the greatest estimated
            mass, in (0, 1]. Text counts, and stays even where it is more. With ``boundaries="exact"`` a part of all
            keys, and clusters with the greatest mass per key are chosen.
        q_clusters: number of clusters of queries. By default 300, as published for 75600 tokens; of longer videos one
            for each 252 tokens, of short ones one for each 48.
        k_clusters: number of clusters of keys. By default 1000; one for each 76 tokens, or for each 24.
        first_iterations: rounds of k-means in a search without a search before it; 10 by default, published are 50.
        iterations: rounds in all others.
        boundaries: blocks that hold parts of several clusters are listed if any of these is chosen (``"keep"``), or
            cut down to those that are (``"exact"``), at a bit of memory for every pair of tokens.
        block: tokens per block of queries and of keys, 16, 32, 64 or 128.
        search_every: sampling steps from one search to the next, counted from the first sparse step.
        compensate: whether blocks that are left out still count by their means.
        dense_steps: sampling steps that stay dense.
        dense_layers: layers that stay dense.
        schedule: instead of these two, with budgets; see :class:`dit_accel.processors.SparseAttnProcessor`.
        backend: kernel backend.

    Raises:
        ValueError: for settings outside these.
    """

    remembers = True
    usual_dense_steps = 0.2  # as published for Wan; 0.1 for HunyuanVideo, 0.3 for Cosmos
    usual_dense_layers = 1  # 3 % of the layers, rounded down
    scales_budget = True

    def __init__(
        self,
        *,
        top_p: float | None = None,
        min_kc_ratio: float | None = None,
        density: float | None = None,
        q_clusters: int | None = None,
        k_clusters: int | None = None,
        first_iterations: int = 10,
        iterations: int = 2,
        boundaries: Literal["keep", "exact"] = "keep",
        block: int = 64,
        search_every: int = 1,
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
        _check_rule(top_p, min_kc_ratio, density)
        by_mass = density is None
        self.top_p = (TOP_P if top_p is None else top_p) if by_mass else None
        self.min_kc_ratio = (MIN_KC_RATIO if min_kc_ratio is None else min_kc_ratio) if by_mass else None
        self.density = None if density is None else float(density)
        _check_numbers(q_clusters, k_clusters, first_iterations, iterations)
        self.q_clusters, self.k_clusters = q_clusters, k_clusters
        self.first_iterations, self.iterations = first_iterations, iterations
        _check_blocks(boundaries, block)
        self.boundaries, self.block = boundaries, block
        check_search_every(search_every)
        self.search_every = search_every
        if by_mass:
            self.refuse_budgets("top_p says by itself how much is kept; give a density")

    def renews(self, site: SiteInfo, state: StepState) -> bool:
        """Every so many steps, counted from the first that is not dense."""
        return (state.step - self.schedule.dense_step_count(state.steps)) % self.search_every == 0

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Setup:
        """Where the text is.

        Raises:
            ValueError: if there are padding tokens, which must not be clustered.
        """
        if layout.padding:
            raise ValueError(
                f"cluster attention cannot tell {layout.padding} padding tokens from others; leave them out"
            )
        setup = Setup(layout.text or (0, 0), layout.length, device)
        return setup if self.density is None else setup._replace(counts=self._counts(setup, (1.0,)))

    def at_step(self, setup: Setup, site: SiteInfo, state: StepState) -> Setup:
        """How much the schedule lets the site keep at a step, if it has budgets."""
        if not self.schedule.has_budgets:
            return setup
        return setup._replace(counts=self._counts(setup, self.budget_factors(site, state)))

    def find_plan(self, query: torch.Tensor, key: torch.Tensor, setup: Setup, *, scale: float | None) -> SparsePlan:
        """A first search; see :func:`dit_accel.kernels.cluster.plan.cluster_plan`."""
        return self.search(query, key, setup, None, scale=scale)[0]

    def search(
        self, query: torch.Tensor, key: torch.Tensor, setup: Setup, memory: Memory | None, *, scale: float | None
    ) -> tuple[SparsePlan, Memory]:
        """Clusters, chooses and lists; the centroids are remembered."""
        start = None if memory is None else (memory[0], memory[1])
        rule = self._rule(setup, self.first_iterations if start is None else self.iterations)
        return cluster_plan(query, key, rule, counts=setup.counts, start=start, scale=scale)

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        names = ("top_p", "min_kc_ratio", "density", "q_clusters", "k_clusters", "first_iterations", "iterations")
        more = ("boundaries", "block", "search_every", "compensate", "backend")
        return self.plain_settings(*names, *more)

    def _rule(self, setup: Setup, iterations: int) -> ClusterRule:
        tokens = setup.tokens - (setup.text[1] - setup.text[0])
        q_clusters = self.q_clusters or usual_clusters(tokens, Q_CLUSTERS, FEWEST_QUERIES)
        k_clusters = min(self.k_clusters or usual_clusters(tokens, K_CLUSTERS, FEWEST_KEYS), tokens)
        return ClusterRule(
            text=setup.text,
            q_clusters=min(q_clusters, tokens),
            k_clusters=k_clusters,
            iterations=iterations,
            block=self.block,
            top_p=1.0 if self.top_p is None else self.top_p,
            minimum=max(1, math.ceil((self.min_kc_ratio or 0) * k_clusters - 1e-9)),
            width=self._width(setup),
            exact=self.boundaries == "exact",
        )

    def _width(self, setup: Setup) -> int:
        """Blocks that no row keeps more of: lists stay in memory from step to step, at every site."""
        blocks = -(-setup.tokens // self.block)
        text, exact = setup.text[0] < setup.text[1], self.boundaries == "exact"
        if self.density is None or text or exact or self.schedule.has_budgets:
            return blocks
        return block_counts(self.density, blocks, (1.0,))[0]

    def _counts(self, setup: Setup, factors: tuple[float, ...]) -> torch.Tensor:
        """Blocks that a row keeps, or keys with exact boundaries."""
        assert self.density is not None  # budgets are refused without
        units = setup.tokens if self.boundaries == "exact" else -(-setup.tokens // self.block)
        return count_tensor(block_counts(self.density, units, factors), setup.device)


def usual_clusters(tokens: int, published: int, fewest: int) -> int:
    """Number of clusters: the published one, more for longer videos, fewer where they would hold too few tokens.

    Args:
        tokens: that are clustered.
        published: clusters for ``TOKENS`` tokens.
        fewest: tokens that a cluster holds on average, at least.
    """
    return max(min(published, math.ceil(tokens / fewest)), math.ceil(tokens * published / TOKENS))


def _check_rule(top_p: float | None, min_kc_ratio: float | None, density: float | None) -> None:
    if density is not None and (top_p is not None or min_kc_ratio is not None):
        raise ValueError("density chooses by itself how much is kept; give it, or top_p and min_kc_ratio")
    if density is not None and not (_is_number(density) and 0 < density <= 1):
        raise ValueError(f"density is the part of all blocks to keep, in (0, 1], such as 0.25; got {density!r}")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p is the part of the mass to keep, in (0, 1], such as 0.9; got {top_p!r}")
    if min_kc_ratio is not None and not (_is_number(min_kc_ratio) and 0 <= min_kc_ratio <= 1):
        raise ValueError(
            f"min_kc_ratio is a part of the clusters of keys, in [0, 1], such as 0.1; got {min_kc_ratio!r}"
        )


def _check_numbers(q_clusters: object, k_clusters: object, first_iterations: object, iterations: object) -> None:
    counts = {"first_iterations": first_iterations, "iterations": iterations}
    counts |= {name: n for name, n in (("q_clusters", q_clusters), ("k_clusters", k_clusters)) if n is not None}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} is a whole number, 1 or more; got {count!r}")


def _check_blocks(boundaries: object, block: object) -> None:
    if boundaries not in BOUNDARIES:
        raise ValueError(f"boundaries are {' or '.join(map(repr, BOUNDARIES))}; got {boundaries!r}")
    if isinstance(block, bool) or block not in BLOCKS:
        raise ValueError(f"cluster attention works on blocks of {', '.join(map(str, BLOCKS))} tokens; got {block!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
