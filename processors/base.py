"""The base classes of every sparse attention method: a method says which plan, and when it is renewed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..plan.schedule import Schedule

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..families import Family
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout

Memory = tuple[torch.Tensor, ...]  # what a search leaves to later ones, in the order of the method

_SCHEDULE_SETTINGS = ("dense_steps", "dense_layers", "schedule")  # what settings() has of a schedule
PUBLISHED_WARM_UP = 0.24  # 12 of 50 steps, what the papers of this field run dense


class SparseAttnProcessor(ABC):
    """A recipe for sparse attention, given to ``set_attn_processor`` or :func:`dit_accel.accelerate`.

    The recipe itself never runs: installing it puts one bound processor on every attention module, and those ask it
    for plans. It holds settings only, so one recipe may serve several pipelines. Methods derive from
    :class:`StaticAttnProcessor` or :class:`DynamicAttnProcessor`.

    Args:
        dense_steps: sampling steps that stay dense at the start; an int counts steps, a float is a fraction of all.
            None: the method's own.
        dense_layers: layers that stay dense: a number (the first so many) or a collection of indices. None: the
            method's own.
        schedule: all of this and budgets by step, layer and head, instead of these two. In a mapping (of the arguments
            of a schedule) ``dense_steps`` and ``dense_layers`` may be left out: then they are the method's own.
        backend: kernel backend, see :func:`dit_accel.kernels.attend.attend`; an explicit choice never falls back.

    Raises:
        ValueError: for a schedule beside dense_steps or dense_layers, or with budgets that the method cannot follow.

    Attributes:
        schedule: which steps and layers stay dense, and what factors there are on budgets.
        usual_dense_steps: the method's own.
        usual_dense_layers: likewise.
        scales_budget: whether the method has a budget that a schedule can change.
        scales_heads: whether heads can have budgets of their own.
    """

    kinds: tuple[str, ...] = ("self", "joint")
    block: int = 128  # tokens per block of the plans it builds; what a kernel must be able to walk
    needs_frames: bool = False  # whether it saves nothing within one frame, and so on images
    usual_dense_steps: int | float = PUBLISHED_WARM_UP
    usual_dense_layers: int = 0
    scales_budget: bool = False
    scales_heads: bool = True

    def __init__(
        self,
        *,
        dense_steps: int | float | None = None,
        dense_layers: int | Collection[int] | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        self.schedule = self._schedule_of(dense_steps, dense_layers, schedule)
        self.backend = backend
        if not self.scales_budget:
            self.refuse_budgets("it has no budget that could be scaled; give a schedule without them")
        if not self.scales_heads:
            self.refuse_head_budgets("its plan is shared by all heads; use step_budget or layer_budget")

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything needed to build an equal recipe, as plain values of JSON; see :meth:`plain_settings`."""

    def check_family(self, family: Family) -> None:
        """Refuses a family of models for which this method can do nothing.

        Raises:
            ValueError: if the family makes images and the method lives on the distance between frames.
        """
        if self.needs_frames and not family.makes_video:
            raise ValueError(
                f"{type(self).__name__} keeps every pair of tokens within a frame, so it saves nothing in "
                f"{family.root_class}, which makes single images; use it with a video model, or leave attention out"
            )

    def is_sparse(self, site: SiteInfo, state: StepState) -> bool:
        """Whether a site runs this method at a step, or stays dense."""
        return site.kind in self.kinds and not self.schedule.is_dense(state.step, state.steps, site.layer)

    def warm_up_steps(self, sites: Iterable[SiteInfo], steps: int | None) -> int:
        """First steps at which the method leaves all attention dense, in which caches reuse nothing either.

        Args:
            sites: of a model.
            steps: of a generation; None if nobody says.
        """
        return self.schedule.dense_step_count(steps)

    def budget_factor(self, site: SiteInfo, state: StepState) -> float:
        """The schedule's factor on what a site keeps at a step, besides those of heads (:meth:`head_factors`)."""
        return self.schedule.factor(state.step, state.steps, site.layer) if self.schedule.has_budgets else 1.0

    def head_factors(self, site: SiteInfo) -> tuple[float, ...] | None:
        """The schedule's factors on what the heads of a site keep; None where they are alike."""
        return self.schedule.head_factors(site.layer)

    def budget_factors(self, site: SiteInfo, state: StepState) -> tuple[float, ...]:
        """Both together: one factor for all heads of a site at a step, or one for each."""
        factor = self.budget_factor(site, state)
        return tuple(factor * of_head for of_head in self.head_factors(site) or (1.0,))

    def plain_settings(self, *names: str) -> dict[str, Any]:
        """The named attributes as plain values of JSON, which has no tuples, and what rebuilds the schedule."""
        values = {name: getattr(self, name) for name in names}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return plain | self.schedule_settings()

    def schedule_settings(self) -> dict[str, Any]:
        """The part of :meth:`settings` that rebuilds the schedule: two shorthands, unless there are budgets."""
        return {"schedule": self.schedule.settings()} if self.schedule.has_budgets else self.schedule.settings()

    def raised(self, factor: float) -> SparseAttnProcessor:
        """The same recipe with another budget throughout.

        Args:
            factor: what its budget is multiplied by at every step.

        Raises:
            ValueError: if it has no budget that could be scaled.
        """
        if not self.scales_budget:
            raise ValueError(f"{type(self).__name__} has no budget that could be scaled by {factor}")
        pairs = [(start, each * factor) for start, each in self.schedule.step_budget]
        if not any(start == 0 for start, _ in pairs):
            pairs.insert(0, (0, factor))
        own = {name: value for name, value in self.settings().items() if name not in _SCHEDULE_SETTINGS}
        return type(self)(**own, schedule=replace(self.schedule, step_budget=pairs))

    def check_schedule(self, heads: Mapping[SiteInfo, int]) -> None:
        """Refuses a schedule that names layers or heads which a model does not have.

        Args:
            heads: number of heads of every site of a model that the method acts on.

        Raises:
            ValueError: if it does.
        """
        layers = max((site.layers for site in heads), default=0)
        named: dict[str, Collection[int]] = {
            name: dict(getattr(self.schedule, name)) for name in ("layer_budget", "head_budget")
        }
        if isinstance(self.schedule.dense_layers, Collection):
            named["dense_layers"] = self.schedule.dense_layers
        for name, listed in named.items():
            unknown = [layer for layer in listed if layer >= layers]
            if unknown:
                raise ValueError(f"{name} names layer {min(unknown)}; this model has layers 0 to {layers - 1}")
        for site, count in heads.items():
            factors = self.head_factors(site)
            if factors is not None and len(factors) != count:
                raise ValueError(
                    f"head_budget has {len(factors)} factors for layer {site.layer}, but {site.path} has {count} "
                    "heads; give one factor for each"
                )

    def check_sites(self, sites: Mapping[SiteInfo, tuple[int, int]]) -> None:
        """Refuses a model at whose attention modules this method can do nothing; does not by default.

        Args:
            sites: heads and head dimension of every site of one root that the method acts on.

        Raises:
            ValueError: if it can do nothing there, saying what would help.
        """
        return

    def refuse_budgets(self, reason: str) -> None:
        """Refuses budgets that some settings of a method leave no room for.

        Args:
            reason: what cannot be scaled, and what to use instead.

        Raises:
            ValueError: if the schedule has budgets.
        """
        if self.schedule.has_budgets:
            raise ValueError(f"{type(self).__name__} cannot follow step_budget, layer_budget or head_budget: {reason}")

    def refuse_head_budgets(self, reason: str) -> None:
        """As :meth:`refuse_budgets`, for those of heads alone."""
        if self.schedule.head_budget:
            raise ValueError(f"{type(self).__name__} cannot follow head_budget: {reason}")

    def _schedule_of(
        self,
        dense_steps: int | float | None,
        dense_layers: int | Collection[int] | None,
        schedule: Schedule | Mapping[str, Any] | None,
    ) -> Schedule:
        named = {"dense_steps": dense_steps, "dense_layers": dense_layers}
        given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        usual: dict[str, Any] = {"dense_steps": self.usual_dense_steps, "dense_layers": self.usual_dense_layers}
        if schedule is None:
            return Schedule(**usual | given)
        if given:
            raise ValueError(f"both a schedule and {' and '.join(given)} were given; put all into the schedule")
        if isinstance(schedule, Mapping):
            unknown = set(schedule) - {field.name for field in fields(Schedule) if field.init}
            if unknown:
                raise ValueError(f"a schedule has no {', '.join(map(repr, sorted(unknown)))}")
            return Schedule(**usual | dict(schedule))
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule is a dit_accel.Schedule or a mapping of its arguments; got {schedule!r}")
        return schedule

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: a recipe put on a module by hand has no plan to follow."""
        raise RuntimeError(
            f"{type(self).__name__} was put on an attention module by hand; install it with "
            "pipe.set_attn_processor(...), pipe.transformer.set_attn_processor(...) or dit_accel.accelerate(pipe, ...)"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"


class StaticAttnProcessor(SparseAttnProcessor):
    """A method whose plan follows from the token layout alone."""

    @abstractmethod
    def build_plan(self, layout: TokenLayout, device: torch.device) -> SparsePlan:
        """The plan for one token layout; called once per layout and device, and kept."""

    def for_site(self, site: SiteInfo) -> StaticAttnProcessor:
        """The recipe whose plan a site follows: this one, or another where layers differ, the same at every call."""
        return self

    def for_step(self, site: SiteInfo, state: StepState) -> StaticAttnProcessor:
        """The recipe whose plan a site follows at a step: that of :meth:`for_site`, or another where budgets differ.

        The same object whenever site and budget are the same: plans are kept by recipe.
        """
        return self.for_site(site)


class DynamicAttnProcessor(SparseAttnProcessor):
    """A method that finds its plan from the queries and keys of a call.

    Each attention module keeps the plan it found, one for each branch of guidance, until :meth:`renews` asks for
    another. Plans are dropped at the start of a generation, when the token layout changes, and on removal; a call
    that finds none kept, or one of another budget (:meth:`budget_factor`), searches, whatever :meth:`renews` says.

    Methods that want more than that say so by their attributes. With the plan a site then keeps what :meth:`search`
    remembers; it belongs to the same branch, and is dropped with the plan.

    Args:
        compensate: whether blocks that a plan leaves out still count, each by its mean key and its summed values
            (:func:`dit_accel.kernels.residual.block_residual`), in calls that search and in those that follow.
        dense_steps: sampling steps that stay dense, see :class:`SparseAttnProcessor`.
        dense_layers: layers that stay dense.
        schedule: instead of these two, see there.
        backend: kernel backend.

    Raises:
        ValueError: if compensate is neither True nor False.

    Attributes:
        dense_first: whether a call that searches because no plan was kept runs dense itself, bit for bit as stock.
        remembers: whether searches are given what the one before remembered.
        measures: whether calls that follow a plan are measured (:meth:`measure`), so that a site may search for what
            has changed (:meth:`has_drifted`).
    """

    dense_first: bool = False
    remembers: bool = False
    measures: bool = False

    def __init__(
        self,
        *,
        compensate: bool = False,
        dense_steps: int | float | None = None,
        dense_layers: int | Collection[int] | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dense_steps=dense_steps, dense_layers=dense_layers, schedule=schedule, backend=backend)
        if not isinstance(compensate, bool):
            raise ValueError(f"compensate is True or False; got {compensate!r}")
        self.compensate = compensate

    @abstractmethod
    def renews(self, site: SiteInfo, state: StepState) -> bool:
        """Whether a site searches anew at a step, or follows the plan it kept; runs outside compiled code.

        Every combination of answers over the sites of a model is a graph of its own under torch.compile.
        """

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Any:
        """All that :meth:`find_plan` needs besides query and key: ranges, a token order, what differs between layers.

        Runs outside compiled code, once per site, layout and device. By default the layout itself.

        Raises:
            ValueError: if the method cannot work with the layout.
        """
        return layout

    def at_step(self, setup: Any, site: SiteInfo, state: StepState) -> Any:
        """What :meth:`find_plan` is given at one step: ``setup``, or another made from it where steps differ.

        Runs before every call, outside compiled code, so it may read the step but must not wait for the device.
        Tensors may change in value from step to step; anything else that changes is another graph under torch.compile.
        """
        return setup

    @abstractmethod
    def find_plan(self, query: torch.Tensor, key: torch.Tensor, setup: Any, *, scale: float | None) -> SparsePlan:
        """The plan of one attention call.

        Runs inside compiled code, so it must be traceable as one graph and must not wait for the device;
        :func:`dit_accel.kernels.search.plan.dynamic_plan` is both.

        Args:
            query: ``[batch, heads, tokens, head_dim]``, rotary embedding applied.
            key: likewise.
            setup: what :meth:`set_up` gave, and :meth:`at_step` made of it.
            scale: softmax scale, None for the usual one.
        """

    def search(
        self, query: torch.Tensor, key: torch.Tensor, setup: Any, memory: Memory | None, *, scale: float | None
    ) -> tuple[SparsePlan, Memory]:
        """As :meth:`find_plan`, which it calls, for methods that remember; inside compiled code, too.

        Args:
            query: as there.
            key: as there.
            setup: as there.
            memory: what the latest search remembered; None if there is no plan or the method does not remember.
            scale: as there.

        Returns:
            the plan, and what to remember.
        """
        return self.find_plan(query, key, setup, scale=scale), ()

    def search_with_values(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        setup: Any,
        memory: Memory | None,
        *,
        scale: float | None,
    ) -> tuple[SparsePlan, Memory]:
        """What sites call: :meth:`search`, for all but methods that judge plans by their output.

        Args:
            query: as there.
            key: as there.
            value: ``[batch, heads, tokens, head_dim]``.
            setup: as there.
            memory: as there.
            scale: as there.

        Returns:
            the plan, and what to remember.
        """
        return self.search(query, key, setup, memory, scale=scale)

    def measure(self, query: torch.Tensor, key: torch.Tensor, memory: Memory) -> torch.Tensor:
        """How far a call that follows a plan is from the one that found it: a scalar on the device.

        Runs inside compiled code as :meth:`find_plan` does; asked only if ``measures``.

        Args:
            query: as there.
            key: as there.
            memory: what the search remembered.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it measures, and has no measure()")

    def has_drifted(self, measures: torch.Tensor) -> bool:
        """Whether all sites of a model search anew, although :meth:`renews` does not say so.

        Asked once before each call of the model, outside compiled code, so it may read the device.

        Args:
            measures: what the sites measured at their latest calls of the same branch, one number for each.
        """
        return False


def check_search_every(steps: object) -> None:
    """Refuses what is no distance between searches.

    Raises:
        ValueError: if it is no whole number of steps, or below 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"search_every is a number of steps, 1 or more; got {steps!r}")
