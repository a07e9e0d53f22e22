"""What is put on a pipeline, and decides at every call of its models what each seam does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .caching.report import cache_report, reused_places
from .caching.together import Anchor, Caches
from .clock import StepClock, StepState
from .controls import AttentionControl
from .densities import by_expert
from .families import family_of
from .install import BlockHook, BoundProcessor, RootInstallation
from .kernels.support import Call, check, choose
from .layout import TokenLayout
from .presets import AutoAttnProcessor, Chosen, Completed, facts_of, situation_of
from .processors.base import DynamicAttnProcessor, SparseAttnProcessor, StaticAttnProcessor
from .processors.operator import OperatorAttnProcessor
from .report import Report, SiteReport
from .roots import find_roots
from .tally import Tally, sparse_density
from .timing import Timer

if TYPE_CHECKING:
    from .caching.recipe import Cache
    from .install import Site
    from .kernels.sparse_plan import SparsePlan
    from .quality import Profile

_HANDLE = "_dit_accel_acceleration"
_UNCOMPILABLE = (
    "a cache decides between the blocks of {0}, so the model cannot be compiled as a whole; call its "
    "compile_repeated_blocks() after accelerate(), or leave the cache out"
)
_PLANS_KEPT = 8  # token layouts whose plans stay in memory; a UNet has one for each level


class Acceleration:
    """What :func:`accelerate` returns; also a context manager that removes itself at the end.

    Attributes:
        processor: the attention recipe, or None.
        caches: what is reused between steps.
        profile: of the quality target that is kept; None without one.
        clock: the step clock of the pipeline; see :meth:`dit_accel.clock.StepClock.set_step` for loops of one's own.
    """

    def __init__(
        self,
        target: Any,
        processor: SparseAttnProcessor | None,
        controls: Sequence[AttentionControl] = (),
        block_hooks: Sequence[BlockHook] = (),
        completed: Completed | None = None,
        caches: Sequence[Cache] = (),
        anchor: Anchor | None = None,
        timed: bool = False,
    ) -> None:
        roots = find_roots(target)
        taken = [name for name, root in roots.items() if _HANDLE in vars(root)]
        if taken:
            raise ValueError(
                f"{', '.join(taken)} is accelerated already; call dit_accel.acceleration_of(...).remove() first"
            )
        self.processor = processor
        self.controls, self.block_hooks = tuple(controls), tuple(block_hooks)
        self._facts, self._completed = facts_of(roots), completed
        self._choices: dict[str, Chosen] = {}  # by expert, of the latest generation
        self.clock = StepClock(None if isinstance(target, nn.Module) else target)
        self._timer = Timer() if timed else None
        self.caches = Caches(caches, self.clock, anchor, self._timer)
        self._raised: dict[tuple[SparseAttnProcessor, float], SparseAttnProcessor] = {}
        if anchor is not None:
            check_anchor(anchor, processor if caches else None)
        self._plans: dict[tuple[StaticAttnProcessor, TokenLayout, torch.device], SparsePlan] = {}
        self._tally = Tally()
        self._steps: tuple[int, set[int]] = (-1, set())
        self._begun: dict[str, int] = {}  # by expert: the generation whose first call it has had
        self._backend: tuple[str, str] | None = None
        self._chosen_for: tuple[SparseAttnProcessor, torch.device] | None = None  # what the backend was chosen for
        self._installed: list[RootInstallation] = []
        self._undo: list[Callable[[], None]] = []
        self.profile: Profile | None = None
        try:
            for expert, root in roots.items():
                self._install(root, expert)
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
        densities = self._tally.densities.read() if self.processor is not None else None
        times = None if self._timer is None else self._timer.read()
        records = [engine.record for engine in self.caches.engines]
        reused = {place for record in records for place in reused_places(record)}
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
            caches=[cache_report(record, times, densities, reused) for record in records],
            timing=times,
            step_densities=by_expert(densities or {}),
        )

    def __repr__(self) -> str:
        preset = self._completed.describe() if self._completed else None
        return f"{type(self).__name__}({self.processor!r}, preset={preset!r})"

    def keep_to(self, profile: Profile, pipe: Any, beside: Mapping[str, Any], strict: bool = False) -> None:
        """Watches that runs stay within what a profile was measured for; see :class:`dit_accel.quality.ProfileGuard`.

        Args:
            profile: that the cache is from.
            pipe: the pipeline.
            beside: other arguments of :func:`accelerate`.
            strict: whether to refuse other runs.
        """
        from .quality.guard import ProfileGuard
        from .quality.request import attention_of

        self.profile = profile
        self._undo.append(ProfileGuard(profile, pipe, attention_of(beside), strict).attach(self.clock))

    @property
    def timed(self) -> bool:
        """Whether the report splits wall time."""
        return self._timer is not None

    def reset_report(self) -> None:
        """Starts counting anew."""
        self._tally.reset()
        for engine in self.caches.engines:
            engine.record.reset()
        if self._timer is not None:
            self._timer.reset()

    def remove(self) -> None:
        """Takes everything off the pipeline; its output is then bit-equal to before. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
        for installed in reversed(self._installed):
            installed.remove()
            vars(installed.root).pop(_HANDLE, None)
        self._installed.clear()
        self.caches.forget()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def replaced(self, target: Any, processor: SparseAttnProcessor | None, anchor: Anchor | None) -> Acceleration:
        """Everything but the method once more, in the place of this one, which is removed already.

        Args:
            target: a pipeline or model.
            processor: the new method; None for none.
            anchor: of the caches beside it.
        """
        caches = [engine.cache for engine in self.caches.engines]
        return Acceleration(target, processor, self.controls, self.block_hooks, None, caches, anchor, self.timed)

    def owns(self, processor: object) -> bool:
        """Whether an attention processor is one of those that this put on its models."""
        sites = (site for installed in self._installed for site in installed.sites.values())
        return isinstance(processor, BoundProcessor) and any(processor.site is site for site in sites)

    @property
    def pipeline(self) -> Any | None:
        """The pipeline, while it has all the models that this is on; None for models alone."""
        pipeline = self.clock.pipeline
        return pipeline if all(getattr(pipeline, each.expert, None) is each.root for each in self._installed) else None

    def _install(self, root: nn.Module, expert: str) -> None:
        if self.processor is not None:
            self.processor.check_family(family_of(root))
        installed = RootInstallation(
            root,
            expert,
            self.clock,
            self.controls,
            () if self.processor is None else self.processor.kinds,
            self.block_hooks,
            self._check_idle,
            self._before,
            self._after,
            self._end,
        )
        self._installed.append(installed)
        object.__setattr__(root, _HANDLE, self)
        if self.caches:
            installed.attach(self.caches.attach(installed), _UNCOMPILABLE.format(type(root).__name__))
        if self.processor is not None:
            kinds = self.processor.kinds
            modules: dict[Site, Any] = {site: m for m, site in installed.sites.items() if site.info.kind in kinds}
            if not modules:
                raise ValueError(_no_sites(self.processor, root, installed))
            heads = installed.heads_of(kinds)
            self.processor.check_schedule({site: count for site, (count, _) in heads.items()})
            self.processor.check_sites(heads)
            for site, module in modules.items():
                if not isinstance(self.processor, AutoAttnProcessor):
                    self._backend = self._choose_backend(module, self.processor)
                elif self.processor.backend != "auto":
                    self._choose_backend(module, self.processor)  # better refused now than at the first call
                site.backend = self.processor.backend
                self._tally.add(site)
        for site in installed.sites.values():
            site.timer = self._timer

    def warm_up_steps(self, steps: int | None) -> int:
        """First steps at which the method leaves all attention dense, in which caches reuse nothing either.

        Args:
            steps: of a generation; None if nobody says.
        """
        return max((self._warm_up_steps(self.processor, each, steps) for each in self._installed), default=0)

    @staticmethod
    def _warm_up_steps(processor: SparseAttnProcessor | None, installed: RootInstallation, steps: int | None) -> int:
        sites = (site.info for site in installed.sites.values())
        return 0 if processor is None else processor.warm_up_steps(sites, steps)

    def _before(self, installed: RootInstallation, state: StepState) -> None:
        """Decides for every site what its next call does; runs before each root call, outside compiled code."""
        self._refuse_recomputation(installed.root)
        if self._steps[0] != state.generation:
            self._steps = (state.generation, set())
        self._steps[1].add(state.step)
        device = installed.device
        processor = self._recipe(installed, state)
        if self.caches:  # they warm up with the method; with dense attention no warm-up of an earlier choice is left
            self.caches.warm_up(self._warm_up_steps(processor, installed, state.steps))
        if processor is not None and self._begun.get(installed.expert) != state.generation:
            self._begun[installed.expert] = state.generation
            self._note_backend(processor, installed)
            self._set_up(processor, installed, state, device)
        renew = self._has_drifted(processor, installed, state)
        for site in installed.sites.values():
            if processor is None or not self._is_sparse(processor, site, state):
                site.prepare(state)
                continue
            method = self._at_anchor(processor, site, state)
            if isinstance(method, DynamicAttnProcessor):
                site.prepare(state, search=method, device=device, renew=renew)
            elif isinstance(method, OperatorAttnProcessor):
                site.prepare(state, operator=method, device=device)
            else:
                site.prepare(state, self._plan(method, site, state, device))
        if self._timer is not None:
            self._timer.begin(state, installed.device)

    def _set_up(
        self, processor: SparseAttnProcessor, installed: RootInstallation, state: StepState, device: torch.device
    ) -> None:
        """Makes at a generation's first call what sparse steps need: a layout that does not fit is refused now."""
        if state.steps is None:
            return
        last = replace(state, step=state.steps - 1)
        for site in installed.sites.values():
            if not processor.is_sparse(site.info, last):
                continue
            if isinstance(processor, (DynamicAttnProcessor, OperatorAttnProcessor)):
                site.set_up(processor, last, device)
            elif not processor.schedule.has_budgets:  # else plans differ from step to step
                self._plan(processor, site, last, device)

    def _note_backend(self, processor: SparseAttnProcessor, installed: RootInstallation) -> None:
        """Which backend the report names; chosen anew for another method or device: models are moved, or offloaded."""
        if self._chosen_for == (processor, installed.device):
            return
        for module, site in installed.sites.items():
            if site in self._tally:
                self._backend = self._choose_backend(module, processor, installed.device)
        self._chosen_for = (processor, installed.device)

    def _check_idle(self) -> None:
        for engine in self.caches.engines:
            engine.check_idle()

    def _end(self) -> None:
        """A pipeline is done: what its next run makes is another generation, whatever it begins with."""
        self.caches.forget()
        self.clock.reset()

    def _is_sparse(self, processor: SparseAttnProcessor, site: Site, state: StepState) -> bool:
        return processor.is_sparse(site.info, state) and not (
            self.caches and self.caches.keeps_dense(site.info, state)
        )

    def _at_anchor(self, processor: SparseAttnProcessor, site: Site, state: StepState) -> SparseAttnProcessor:
        """The method of a site; one that keeps more where the call follows several that were skipped there."""
        factor = self.caches.density_factor(site.info, state)
        if factor == 1:
            return processor
        if (processor, factor) not in self._raised:
            self._raised[processor, factor] = processor.raised(factor)
        return self._raised[processor, factor]

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
        for site in installed.sites.values():
            site.forget()
            if choice.recipe is not None and site in self._tally:
                site.backend = choice.recipe.backend
        self._choices[installed.expert] = Chosen(state.generation, situation, choice)
        if all(chosen.choice.recipe is None for chosen in self._choices.values()):
            self._backend = None
        return choice.recipe

    def _refuse_recomputation(self, root: nn.Module) -> None:
        """Blocks recomputed for the backward pass run after the call, when sites are stock again: another function."""
        if (
            (self.processor is not None or self.caches)
            and torch.is_grad_enabled()
            and getattr(root, "is_gradient_checkpointing", False)
        ):
            what = "a cache" if self.processor is None else type(self.processor).__name__
            raise NotImplementedError(
                f"{what} does not work with gradient checkpointing yet: blocks would be recomputed dense. Call "
                f"{type(root).__name__}.disable_gradient_checkpointing(), or run under torch.no_grad()"
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

    def _choose_backend(
        self, module: Any, processor: SparseAttnProcessor, device: torch.device | None = None
    ) -> tuple[str, str]:
        """Name and reason of the backend a module will use; refuses one asked for by name that cannot run here.

        Args:
            module: an attention module.
            processor: the method.
            device: where it runs; None, before the first call, for where it should, by weights and pipeline.
        """
        weight = next(module.parameters())
        head_dim = module.inner_dim // module.heads
        if device is None:
            device = _device_ahead(weight, self.clock.pipeline)
        call = Call(device.type, weight.dtype, head_dim, processor.block, processor.block, device_index=device.index)
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
        if self._timer is not None:
            self._timer.end()
        for site in installed.sites.values():
            if state is not None and self.caches and self.caches.skipped(site.info):
                site.skip(state)
            elif state is not None:
                self._tally.count(site, state)
            site.rest()

    def _plan_density(self, sites: list[SiteReport]) -> float | None:
        """Mean over the sparse calls that are counted; of a static method before the first, over the plans it has."""
        found = sparse_density(sites)
        if found is not None or not isinstance(self.processor, StaticAttnProcessor):
            return found
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


def _device_ahead(weight: Any, pipeline: Any | None) -> torch.device:
    """Where a model is going to run, by its weights, unless they wait elsewhere because they are offloaded."""
    device: torch.device = weight.device
    return getattr(pipeline, "_execution_device", device) if device.type in ("cpu", "meta") else device


def _no_sites(processor: SparseAttnProcessor, root: nn.Module, installed: RootInstallation) -> str:
    kinds = Counter(site.info.kind for site in installed.sites.values())
    there = " and ".join(f"{count} {kind}-attention" for kind, count in kinds.items())
    return (
        f"{type(processor).__name__} acts on {' and '.join(processor.kinds)} attention, and {type(root).__name__} has "
        f"{there} modules only; leave attention out, or use another model"
    )


def check_anchor(anchor: Anchor, processor: SparseAttnProcessor | None) -> None:
    """Refuses a method that cannot keep more after skipped calls.

    Args:
        anchor: says how much more.
        processor: the method beside the cache; None if one of both is missing.

    Raises:
        ValueError: if there is none, its recipe is not known before the run, or it has no budget to raise.
    """
    if processor is None or isinstance(processor, AutoAttnProcessor):
        raise ValueError("an anchor wants a cache and a sparse method chosen by name or as a processor, together")
    try:
        processor.raised(anchor.factor)
    except ValueError as error:
        raise ValueError(f"{processor!r} cannot keep more at an anchor: {error}") from error


def acceleration_of(target: Any) -> Acceleration | None:
    """The acceleration installed on a pipeline or model, or None."""
    roots = find_roots(target).values() if not isinstance(target, nn.Module) else [target]
    return next((vars(root)[_HANDLE] for root in roots if _HANDLE in vars(root)), None)
