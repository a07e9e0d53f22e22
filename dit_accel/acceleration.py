"""The front door: ``accelerate(pipe, attention="radial")`` and what it returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .clock import StepClock, StepState
from .controls import AttentionControl
from .families import family_of
from .install import BlockHook, RootInstallation, TokenPermutation
from .kernels.support import Call, check, choose
from .layout import TokenLayout
from .presets import AUTO, AutoAttnProcessor, Chosen, Completed, facts_of, recipe_by_name, situation_of
from .processors.base import DynamicAttnProcessor, SparseAttnProcessor, StaticAttnProcessor
from .processors.operator import OperatorAttnProcessor
from .report import Report, SiteReport
from .roots import find_roots
from .tally import Tally, sparse_density

if TYPE_CHECKING:
    from .install import Site
    from .install.permutation import OrderFor
    from .kernels.sparse_plan import SparsePlan

_HANDLE = "_dit_accel_acceleration"
_PLANS_KEPT = 8  # token layouts whose plans stay in memory; a UNet has one for each level


class Acceleration:
    """What :func:`accelerate` returns; also a context manager that removes itself at the end.

    Attributes:
        processor: the attention recipe, or None.
        clock: the step clock of the pipeline; see :meth:`dit_accel.clock.StepClock.set_step` for loops of one's own.
    """

    def __init__(
        self,
        target: Any,
        processor: SparseAttnProcessor | None,
        controls: Sequence[AttentionControl] = (),
        block_hooks: Sequence[BlockHook] = (),
        completed: Completed | None = None,
    ) -> None:
        roots = find_roots(target)
        taken = [name for name, root in roots.items() if _HANDLE in vars(root)]
        if taken:
            raise ValueError(
                f"{', '.join(taken)} is accelerated already; call dit_accel.acceleration_of(...).remove() first"
            )
        self.processor = processor
        self._facts, self._completed = facts_of(roots), completed
        self._choices: dict[str, Chosen] = {}  # by expert, of the latest generation
        self.clock = StepClock(None if isinstance(target, nn.Module) else target)
        self._plans: dict[tuple[StaticAttnProcessor, TokenLayout, torch.device], SparsePlan] = {}
        self._tally = Tally()
        self._steps: tuple[int, set[int]] = (-1, set())
        self._backend: tuple[str, str] | None = None
        self._installed: list[RootInstallation] = []
        try:
            for expert, root in roots.items():
                self._install(root, expert, tuple(controls), tuple(block_hooks))
        except BaseException:
            self.remove()
            raise

    def report(self) -> Report:
        """What has happened since installation, or since the report was last reset by :meth:`reset_report`.

        Waits for the device if the method is a dynamic one, whose densities are on it.
        """
        for installed in self._installed:
            for path in installed.replaced():
                self._tally.fallbacks[f"{installed.expert}:{path}"] = "another attention processor was put here since"
        sites = self._tally.read()
        return Report(
            method=repr(self.processor) if self.processor else None,
            backend=self._backend[0] if self._backend else None,
            backend_reason=self._backend[1] if self._backend else "",
            plan_density=self._plan_density(sites),
            steps=len(self._steps[1]),
            sites=sites,
            fallbacks=dict(self._tally.fallbacks),
            preset=self._completed.describe() if self._completed else None,
            choices={expert: chosen.report() for expert, chosen in self._choices.items()},
        )

    def __repr__(self) -> str:
        preset = self._completed.describe() if self._completed else None
        return f"{type(self).__name__}({self.processor!r}, preset={preset!r})"

    def reset_report(self) -> None:
        """Starts counting anew."""
        self._tally.reset()

    def remove(self) -> None:
        """Takes everything off the pipeline; its output is then bit-equal to before. Safe to call twice."""
        for installed in reversed(self._installed):
            installed.remove()
            vars(installed.root).pop(_HANDLE, None)
        self._installed.clear()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _install(
        self, root: nn.Module, expert: str, controls: tuple[AttentionControl, ...], hooks: tuple[BlockHook, ...]
    ) -> None:
        if self.processor is not None:
            self.processor.check_family(family_of(root))
        installed = RootInstallation(root, expert, self.clock, controls, hooks, self._before, self._after)
        self._installed.append(installed)
        object.__setattr__(root, _HANDLE, self)
        if self.processor is not None:
            kinds = self.processor.kinds
            modules: dict[Site, Any] = {site: m for m, site in installed.sites.items() if site.info.kind in kinds}
            if not modules:
                raise ValueError(_no_sites(self.processor, root, installed))
            heads = installed.heads_of(kinds)
            self.processor.check_budgets({site: count for site, (count, _) in heads.items()})
            self.processor.check_sites(heads)
            for site, module in modules.items():
                if not isinstance(self.processor, AutoAttnProcessor):
                    self._backend = self._choose_backend(module, self.processor)
                elif self.processor.backend != "auto":
                    self._choose_backend(module, self.processor)  # better refused now than at the first call
                site.backend = self.processor.backend
                self._tally.add(site)

    def _before(self, installed: RootInstallation, state: StepState) -> None:
        """Decides for every site what its next call does; runs before each root call, outside compiled code."""
        self._refuse_recomputation(installed.root)
        if self._steps[0] != state.generation:
            self._steps = (state.generation, set())
        self._steps[1].add(state.step)
        device = next(installed.root.parameters()).device
        processor = self._recipe(installed, state)
        renew = self._has_drifted(processor, installed, state)
        for site in installed.sites.values():
            if processor is None or not processor.is_sparse(site.info, state):
                site.prepare(state)
            elif isinstance(processor, DynamicAttnProcessor):
                site.prepare(state, search=processor, device=device, renew=renew)
            elif isinstance(processor, OperatorAttnProcessor):
                site.prepare(state, operator=processor, device=device)
            else:
                site.prepare(state, self._plan(processor, site, state, device))

    def _recipe(self, installed: RootInstallation, state: StepState) -> SparseAttnProcessor | None:
        """The method of the coming call: the one given, or what was chosen when this generation began."""
        if not isinstance(self.processor, AutoAttnProcessor):
            return self.processor
        before = self._choices.get(installed.expert)
        if before is not None and before.generation == state.generation:
            return before.choice.recipe
        situation = situation_of(installed, state, self._facts, self.processor.kinds)
        if before is not None and before.situation == situation:  # the same recipe, whose plans are kept
            self._choices[installed.expert] = replace(before, generation=state.generation)
            return before.choice.recipe
        choice = self.processor.for_situation(situation)
        for module, site in installed.sites.items():
            site.forget()
            if choice.recipe is not None and site in self._tally:
                self._backend = self._choose_backend(module, choice.recipe)
                site.backend = choice.recipe.backend
        self._choices[installed.expert] = Chosen(state.generation, situation, choice)
        if all(chosen.choice.recipe is None for chosen in self._choices.values()):
            self._backend = None
        return choice.recipe

    def _refuse_recomputation(self, root: nn.Module) -> None:
        """Blocks recomputed for the backward pass run after the call, when sites are stock again: another function."""
        if (
            self.processor is not None
            and torch.is_grad_enabled()
            and getattr(root, "is_gradient_checkpointing", False)
        ):
            raise NotImplementedError(
                f"{type(self.processor).__name__} does not work with gradient checkpointing yet: blocks would be "
                f"recomputed dense. Call {type(root).__name__}.disable_gradient_checkpointing(), or run under "
                "torch.no_grad()"
            )

    @staticmethod
    def _has_drifted(processor: SparseAttnProcessor | None, installed: RootInstallation, state: StepState) -> bool:
        """Whether what the sites measured last asks for a search of all together: apart they would be many graphs."""
        if not isinstance(processor, DynamicAttnProcessor) or not processor.measures:
            return False
        measures = [part for site in installed.sites.values() if (part := site.measure_of(state)) is not None]
        return bool(measures) and processor.has_drifted(
            torch.stack([part.to(measures[0].device) for part in measures])
        )

    @staticmethod
    def _choose_backend(module: Any, processor: SparseAttnProcessor) -> tuple[str, str]:
        """Name and reason of the backend a module will use; refuses one asked for by name that cannot run here."""
        weight = next(module.parameters())
        head_dim = module.inner_dim // module.heads
        device, block = weight.device, processor.block
        call = Call(device.type, weight.dtype, head_dim, block, block, device_index=device.index)
        if processor.backend == "auto":
            chosen = choose(call)
        else:
            chosen = check(processor.backend, call)
        if not chosen.ok:
            raise ValueError(f"the {chosen.backend} backend cannot run here: {chosen.reason}")
        if isinstance(processor, OperatorAttnProcessor):
            return "torch", f"the method computes its attention itself; parts that need log-sum-exps: {chosen.backend}"
        if chosen.variant == "tma" and processor.backend == "auto":
            return chosen.backend, f"{chosen.reason}; the pointer variant for plans with a pair test or a residual"
        return chosen.backend, chosen.reason

    def _after(self, installed: RootInstallation) -> None:
        state = self.clock.state
        for site in installed.sites.values():
            if state is not None:
                self._tally.count(site, state)
            site.rest()

    def _plan_density(self, sites: list[SiteReport]) -> float | None:
        """Mean over the plans of a static method, over the sparse calls of another."""
        if not isinstance(self.processor, StaticAttnProcessor):
            return sparse_density(sites)
        plans = [plan.density for plan in self._plans.values()]
        return sum(plans) / len(plans) if plans else None

    def _plan(self, processor: SparseAttnProcessor, site: Site, state: StepState, device: torch.device) -> SparsePlan:
        assert isinstance(processor, StaticAttnProcessor)  # the other kind is asked at each site
        recipe, layout = processor.for_step(site.info, state), site.layout or state.layout
        key = (recipe, layout, device)
        if key not in self._plans:
            # Where budgets differ, every site may have two plans: those of a step stay for its other branches.
            most = max(_PLANS_KEPT, 2 * len(self._tally)) if processor.schedule.has_budgets else _PLANS_KEPT
            while len(self._plans) >= most:
                self._plans.pop(next(iter(self._plans)))
            with torch.inference_mode(False):  # what is kept may be used in training later
                self._plans[key] = recipe.build_plan(layout, device)
        return self._plans[key]


def accelerate(
    target: Any,
    attention: str | SparseAttnProcessor | None = None,
    *,
    controls: Sequence[AttentionControl] = (),
    block_hooks: Sequence[BlockHook] = (),
    token_order: OrderFor | None = None,
    preset: str | None = AUTO,
    **settings: Any,
) -> Acceleration:
    """Accelerates a pipeline or a bare transformer in place.

    Args:
        target: a diffusers pipeline, or its transformer or UNet.
        attention: a method's name such as ``"radial"``, ``"auto"`` for the one that suits model, tokens, steps and
            device, one of :mod:`dit_accel.processors`, or None to leave attention as it is (with controls or hooks
            alone).
        controls: attention controls, in the order in which they act.
        block_hooks: hooks around every transformer block, outermost first.
        token_order: gives the order in which the blocks have their video tokens, see
            :class:`dit_accel.install.TokenPermutation`; None for frame by frame, row by row.
        preset: where a method given by name has the settings from that are not given here: ``"auto"``, those
            published for the model, if any; the name of a preset (:data:`dit_accel.presets.PRESETS`); None, the
            method's own defaults.
        **settings: settings of the method, when given by name.

    Returns:
        a handle with ``report()`` and ``remove()``; also a context manager.

    Raises:
        UnknownModelError: if the model is of no registered family.
        ValueError: for bad settings, a method that does nothing for the model, a control that acts nowhere, a target
            accelerated already, or one that is compiled already.
    """
    completed = None
    if isinstance(attention, str):
        attention, completed = recipe_by_name(attention, settings, facts_of(find_roots(target)), preset)
    elif settings or preset not in (AUTO, None):
        given = [*sorted(settings), *(["preset"] if preset not in (AUTO, None) else [])]
        raise ValueError(f"settings {given} belong to a method given by name; give them to the processor")
    if attention is not None and not is_ours(attention):
        raise ValueError(
            "attention is a method's name or a dit_accel processor, that is an OperatorAttnProcessor, "
            f"StaticAttnProcessor or DynamicAttnProcessor; got {type(attention).__name__}"
        )
    if token_order is not None:
        block_hooks = (TokenPermutation(token_order), *block_hooks)
    return Acceleration(target, attention, controls, block_hooks, completed)


def _no_sites(processor: SparseAttnProcessor, root: nn.Module, installed: RootInstallation) -> str:
    kinds = Counter(site.info.kind for site in installed.sites.values())
    there = " and ".join(f"{count} {kind}-attention" for kind, count in kinds.items())
    return (
        f"{type(processor).__name__} acts on {' and '.join(processor.kinds)} attention, and {type(root).__name__} has "
        f"{there} modules only; leave attention out, or use another model"
    )


def is_ours(processor: object) -> bool:
    """Whether an object is one of our recipes."""
    ours = (StaticAttnProcessor, DynamicAttnProcessor, OperatorAttnProcessor, AutoAttnProcessor)
    return isinstance(processor, ours)


def acceleration_of(target: Any) -> Acceleration | None:
    """The acceleration installed on a pipeline or model, or None."""
    roots = find_roots(target).values() if not isinstance(target, nn.Module) else [target]
    return next((vars(root)[_HANDLE] for root in roots if _HANDLE in vars(root)), None)


def replace_processor(target: Any, processor: Any) -> None:
    """What ``set_attn_processor`` does on pipelines, and on models for our processors: the new one replaces ours."""
    current = acceleration_of(target)
    if current is not None:
        current.remove()
    if is_ours(processor):
        Acceleration(target, processor)
        return
    root: Any
    for root in find_roots(target).values():
        root.set_attn_processor(dict(processor) if isinstance(processor, dict) else processor)
