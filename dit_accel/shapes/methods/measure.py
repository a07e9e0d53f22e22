"""What plans keep: their density on calls of a dense run, by which methods are tuned, and their recall at work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...clock import StepState
from ...controls import AttentionCall, AttentionControl, SiteInfo, attention_rows
from ...inspect.tuning import plan_of
from ...install.interception import BoundProcessor
from ...kernels.search.plan import device_density
from ...layout import TokenLayout
from ...processors import SparseAttnProcessor, StaticAttnProcessor
from ...roots import find_roots

if TYPE_CHECKING:
    from ...install import Site
    from ...install.permutation import OrderFor
    from ...kernels.sparse_plan import SparsePlan

MEASURED_AT = (0.4, 0.7, 1.0)  # of all steps; behind the dense ones of every method
QUERIES = 2500  # of a call that are looked at, evenly spaced; all of them in shorter sequences
ROWS = 256  # queries whose attention is held at once
DECIMALS = 4

Density = Callable[[SparseAttnProcessor, "OrderFor | None"], "float | None"]


def measured_steps(steps: int) -> tuple[int, ...]:
    """At which steps of a run plans are looked at; fewer than three if the run is short."""
    return tuple(sorted({max(0, round(part * steps) - 1) for part in MEASURED_AT}))


class KeptCall(NamedTuple):
    """Where an attention call was, and its query, key and value, ``[batch, heads, tokens, head_dim]`` each."""

    at: AttentionCall
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class _FirstCalls(AttentionControl):
    """Acts at the first call of every self- or joint-attention module at some steps: one branch of guidance."""

    def __init__(self, steps: Sequence[int]) -> None:
        super().__init__(kinds=("self", "joint"))
        self.at, self._seen = frozenset(steps), set[tuple[str, str, int]]()

    def acts_at(self, state: StepState) -> bool:
        return state.step in self.at

    def _is_first(self, call: AttentionCall) -> bool:
        where = (call.site.expert, call.site.path, call.state.step)
        first = where not in self._seen
        self._seen.add(where)
        return first


class CallKeeper(_FirstCalls):
    """Keeps queries, keys and values.

    Args:
        steps: of the generation, from 0.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        super().__init__(steps)
        self.calls: list[KeptCall] = []

    def record(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Keeps copies."""
        if self._is_first(call):
            self.calls.append(KeptCall(call, query.clone(), key.clone(), value.clone()))


class PlanQuality(_FirstCalls):
    """How much of the softmax the plan of a call keeps, and how far the output is from that of dense attention.

    For the queries, keys and values of the call itself, which come from a run with the method. It costs more than
    dense attention, and changes nothing. Calls that run dense are passed over.

    Args:
        recipe: the method at work.
        steps: of the generation, from 0.
    """

    def __init__(self, recipe: SparseAttnProcessor, steps: Sequence[int]) -> None:
        super().__init__(steps)
        self._recipe = recipe
        self._sites: dict[SiteInfo, Site] = {}
        self._found: dict[int, list[tuple[float | None, float]]] = {}  # by layer
        self._latest: tuple[SparsePlan, torch.Tensor] | None = None  # static plans serve many calls

    def attach(self, pipe: Any) -> None:
        """Finds the sites of an accelerated pipeline, whose plans are looked at."""
        modules = (module for root in find_roots(pipe).values() for module in root.modules())
        bound = (getattr(module, "processor", None) for module in modules)
        self._sites = {each.site.info: each.site for each in bound if isinstance(each, BoundProcessor)}

    def record(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Measures one call."""
        site = self._sites[call.site]
        if not self._recipe.is_sparse(call.site, call.state) or site.found_dense or site.refusal is not None:
            return
        if self._is_first(call):
            mask = self._mask(site.plan if site.found is None else site.found)
            self._found.setdefault(call.site.layer, []).append(plan_quality(mask, query, key, value, output))

    def result(self) -> dict[str, Any]:
        """Means over all calls and by layer; None for the recall of a method without plans or without sparse calls."""
        layers = {str(layer): self._means(found) for layer, found in sorted(self._found.items())}
        return {**self._means([each for found in self._found.values() for each in found]), "by_layer": layers}

    def _mask(self, plan: SparsePlan | None) -> torch.Tensor | None:
        if plan is None:
            return None
        if self._latest is None or self._latest[0] is not plan:
            self._latest = (plan, plan.element_mask())
        return self._latest[1]

    @staticmethod
    def _means(found: Sequence[tuple[float | None, float]]) -> dict[str, float | None]:
        recalls = [recall for recall, _ in found if recall is not None]
        return {
            "recall": round(statistics.mean(recalls), DECIMALS) if recalls else None,
            "output_error": round(statistics.mean(error for _, error in found), DECIMALS) if found else None,
        }


def plan_quality(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
) -> tuple[float | None, float]:
    """Recall of a plan and error of an output for one attention call.

    Args:
        mask: bool ``[batch or 1, heads or 1, queries, keys]``, who attends to whom; None for a method without plans.
        query: ``[batch, heads, queries, head_dim]``; key, value and output likewise.
        key: of the call.
        value: of the call.
        output: what the method gave.

    Returns:
        share of the softmax mass on kept pairs, a mean over the queries looked at, and the norm of the difference
        between the output and that of dense attention over the norm of the latter.
    """
    every = -(-query.shape[2] // QUERIES)
    query, output = query[:, :, ::every], output[:, :, ::every]
    mask = None if mask is None else mask[:, :, ::every]
    kept, far, norm, start = 0.0, 0.0, 0.0, 0
    for weights in attention_rows(query, key, ROWS):
        stop = start + weights.shape[2]
        if mask is not None:
            kept += float((weights * mask[:, :, start:stop]).sum())
        dense = weights @ value.float()
        far += float((output[:, :, start:stop].float() - dense).square().sum())
        norm += float(dense.square().sum())
        start = stop
    queries = math.prod(query.shape[:3])
    return None if mask is None else kept / queries, math.sqrt(far / norm) if norm else math.inf


def density_on(calls: Sequence[KeptCall]) -> Density:
    """A function that gives the mean density of a method's plans for kept calls; None if it is dense in all of them.

    Every call is searched for itself; so a plan that a method keeps over several steps is not looked at here.
    """

    def density(recipe: SparseAttnProcessor, order_for: OrderFor | None) -> float | None:
        static: dict[tuple[StaticAttnProcessor, TokenLayout], float] = {}
        found = [
            _density(recipe, call if order_for is None else _in_order(call, order_for), static)
            for call in calls
            if recipe.is_sparse(call.at.site, call.at.state)
        ]
        return statistics.mean(found) if found else None

    return density


def _in_order(call: KeptCall, order_for: OrderFor) -> KeptCall:
    order = order_for(call.at.layout)
    if order is None:
        return call
    order = order.to(call.query.device)
    permuted = replace(call.at, layout=replace(call.at.layout, order=order))
    return KeptCall(permuted, *(x.index_select(2, order) for x in call[1:]))


def _density(
    recipe: SparseAttnProcessor, call: KeptCall, static: dict[tuple[StaticAttnProcessor, TokenLayout], float]
) -> float:
    if not isinstance(recipe, StaticAttnProcessor):
        return float(device_density(plan_of(recipe, *call)))
    own = recipe.for_step(call.at.site, call.at.state), call.at.layout
    if own not in static:
        static[own] = plan_of(recipe, *call).density
    return static[own]
