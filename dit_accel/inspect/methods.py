"""Every method at the same density, whatever the model, for a call that is looked at."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..controls import AttentionCall
from ..families import Family
from ..kernels.search.plan import count_density
from ..kernels.sparse_plan import SparsePlan
from ..layout import TokenLayout
from ..processors import ATTENTION, processor_by_name
from ..processors.base import DynamicAttnProcessor, SparseAttnProcessor, StaticAttnProcessor
from .tuning import Options, knob_of, plan_of, tune

BLOCK = 64  # tokens per block of all methods, so that none is finer than another
NEAR = 0.04  # relative distance to the density asked for at which the search for the setting ends
TURNS = 10


class Candidate:
    """A method that keeps about a given part of all pairs, whatever the model.

    Its setting is looked for once per token layout, and per site if the plan depends on queries and keys: at the first
    call. The plans of later calls may be a little denser or sparser; what they are is measured.

    Args:
        name: a name of :data:`dit_accel.processors.ATTENTION`.
        density: part of all pairs to keep, in (0, 1].

    Raises:
        ValueError: for an unknown name, a density out of range, or a method that cannot be told a density.
    """

    def __init__(self, name: str, density: float) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"a density is the part of all pairs to keep, in (0, 1]; got {density}")
        processor_by_name(name)  # raises if there is no such method
        self.name, self.density = name, density
        self.parameters = set(inspect.signature(ATTENTION[name]).parameters)
        if not issubclass(ATTENTION[name], (StaticAttnProcessor, DynamicAttnProcessor)):
            raise ValueError(f"{name} does not choose pairs of tokens, so it has no density to be compared at")
        self.knob = knob_of(name)
        if self.knob.name not in self.parameters:
            raise ValueError(f"{name} has no setting that says how many pairs it keeps")
        self._found: dict[tuple[TokenLayout, str], Options] = {}
        self._static: dict[tuple[TokenLayout, str], SparsePlan] = {}

    def recipe(self, amount: Options) -> SparseAttnProcessor:
        """The method with its amount set; no step and no layer is dense."""
        common = {"block": BLOCK, "dense_steps": 0, "dense_layers": 0}
        return processor_by_name(self.name, **{n: v for n, v in common.items() if n in self.parameters}, **amount)

    def amount_found(self) -> dict[str, Any]:
        """The setting that says how much it keeps: the median over all layouts and sites, and the size of blocks.

        Raises:
            ValueError: before the first call.
        """
        if not self._found:
            raise ValueError(f"{self.name} has not been tried yet")
        amounts = sorted(found[self.knob.name] for found in self._found.values())
        block = {"block": BLOCK} if "block" in self.parameters else {}
        return block | {self.knob.name: round(amounts[len(amounts) // 2], 4)}

    def follows_budgets(self) -> bool:
        """Whether a schedule can scale what it keeps by layer."""
        return self._takes(layer_budget={0: 1.0})

    def follows_head_budgets(self) -> bool:
        """Whether a schedule can scale what it keeps by head."""
        return self._takes(head_budget={0: [1.0]})

    def _takes(self, **budget: Any) -> bool:
        """Whether the recipe that was found accepts a budget; methods refuse those that they cannot follow."""
        try:
            processor_by_name(self.name, **self.amount_found(), schedule=budget)
        except ValueError:
            return False
        return True

    def chosen(self, call: AttentionCall) -> SparseAttnProcessor | None:
        """The recipe that was found for the layout and site of a call; None before the first one."""
        found = self._found.get(self._key(call))
        return None if found is None else self.recipe(found)

    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[SparseAttnProcessor, SparsePlan]:
        """What the method keeps of a call, and by which settings.

        Args:
            call: where and when.
            query: ``[batch, heads, tokens, head_dim]``.
            key: likewise.
            value: likewise.

        Returns:
            the recipe and its plan, whose density is counted.

        Raises:
            ValueError: if the method cannot work with the layout.
        """
        where = self._key(call)
        if where not in self._found:
            self._found[where] = self._search(call, query, key, value)
        recipe = self.recipe(self._found[where])
        plan = self._static.get(where)
        if plan is None or plan.device != query.device:
            plan = count_density(plan_of(recipe, call, query, key, value))
        if isinstance(recipe, StaticAttnProcessor):
            self._static[where] = plan
        return recipe, plan

    def _key(self, call: AttentionCall) -> tuple[TokenLayout, str]:
        by_layout = issubclass(ATTENTION[self.name], StaticAttnProcessor)
        return call.layout, "" if by_layout else f"{call.site.expert}:{call.site.path}"

    def _search(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Options:
        """The settings whose plan comes nearest to the density."""

        def density_of(options: Options) -> float:
            return count_density(plan_of(self.recipe(options), call, query, key, value)).density

        return tune(density_of, [self.knob], self.density, NEAR, TURNS)[0]


def candidates(
    names: Sequence[str] | None, density: float, families: Sequence[Family]
) -> tuple[list[Candidate], dict[str, str]]:
    """The methods that can act on a model at a density.

    Args:
        names: of methods; None for all.
        density: part of all pairs to keep, in (0, 1].
        families: of the model's roots.

    Returns:
        those that can, and for each of the others the reason why not.

    Raises:
        ValueError: if a name is unknown, or a method that was named cannot act.
    """
    found, refused = [], {}
    for name in names or ATTENTION:
        try:
            candidate = Candidate(name, density)
            for family in families:
                processor_by_name(name).check_family(family)
            found.append(candidate)
        except ValueError as error:
            if names:
                raise
            refused[name] = str(error)
    return found, refused
