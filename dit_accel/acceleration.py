"""The front door: ``accelerate(pipe, attention="radial")`` and what it returns."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .clock import StepClock, StepState
from .controls import AttentionControl
from .families import UnknownModelError, family_of, is_known
from .install import BlockHook, RootInstallation, TokenPermutation
from .kernels.support import Call, check, choose
from .layout import TokenLayout
from .processors.base import DynamicAttnProcessor, SparseAttnProcessor, StaticAttnProcessor
from .report import Report, SiteReport

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
    ) -> None:
        roots = find_roots(target)
        taken = [name for name, root in roots.items() if _HANDLE in vars(root)]
        if taken:
            raise ValueError(
                f"{', '.join(taken)} is accelerated already; call dit_accel.acceleration_of(...).remove() first"
            )
        self.processor = processor
        self.clock = StepClock(None if isinstance(target, nn.Module) else target)
        self._plans: dict[tuple[StaticAttnProcessor, TokenLayout, torch.device], SparsePlan] = {}
        self._tally: dict[Site, SiteReport] = {}
        self._unread: dict[Site, torch.Tensor] = {}  # what tallies have yet to add to `kept`, still on the device
        self._fallbacks: dict[str, str] = {}
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
                self._fallbacks[f"{installed.expert}:{path}"] = "another attention processor was put here since"
        for site, kept in self._unread.items():
            self._tally[site].kept += float(kept)
        self._unread.clear()
        return Report(
            method=repr(self.processor) if self.processor else None,
            backend=self._backend[0] if self._backend else None,
            backend_reason=self._backend[1] if self._backend else "",
            plan_density=self._plan_density(),
            steps=len(self._steps[1]),
            sites=[replace(tally) for tally in self._tally.values()],
            fallbacks=dict(self._fallbacks),
        )

    def reset_report(self) -> None:
        """Starts counting anew."""
        for tally in self._tally.values():
            tally.sparse_calls, tally.dense_calls, tally.kept = 0, 0, 0.0
        self._unread.clear()
        self._fallbacks.clear()

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
            for module, site in installed.sites.items():
                if site.info.kind in self.processor.kinds:
                    self._backend = self._choose_backend(module, self.processor)
                    site.backend = self.processor.backend
                    self._tally[site] = SiteReport(f"{expert}:{site.info.path}", site.info.kind)

    def _before(self, installed: RootInstallation, state: StepState) -> None:
        """Decides for every site what its next call does; runs before each root call, outside compiled code."""
        self._refuse_recomputation(installed.root)
        if self._steps[0] != state.generation:
            self._steps = (state.generation, set())
        self._steps[1].add(state.step)
        device = next(installed.root.parameters()).device
        renew = self._has_drifted(installed, state)
        for site in installed.sites.values():
            processor = self.processor
            if processor is None or not processor.is_sparse(site.info, state):
                site.prepare(state)
            elif isinstance(processor, DynamicAttnProcessor):
                site.prepare(state, search=processor, device=device, renew=renew)
            else:
                site.prepare(state, self._plan(site, site.layout or state.layout, device))

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

    def _has_drifted(self, installed: RootInstallation, state: StepState) -> bool:
        """Whether what the sites measured last asks for a search of all together: apart they would be many graphs."""
        if not isinstance(self.processor, DynamicAttnProcessor) or not self.processor.measures:
            return False
        measures = [part for site in installed.sites.values() if (part := site.measure_of(state)) is not None]
        return bool(measures) and self.processor.has_drifted(
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
        if chosen.variant == "tma" and processor.backend == "auto":
            return chosen.backend, f"{chosen.reason}; the pointer variant for plans with a pair test or a residual"
        return chosen.backend, chosen.reason

    def _after(self, installed: RootInstallation) -> None:
        state = self.clock.state
        for site in installed.sites.values():
            tally = self._tally.get(site)
            if tally is not None and state is not None:
                self._count(site, tally, state)
            site.rest()

    def _count(self, site: Site, tally: SiteReport, state: StepState) -> None:
        density = site.settle(state)
        if density is None and site.is_unused:
            return  # it was not called, since a hook stood in for its block
        if density is None:
            tally.dense_calls += 1
            tally.kept += 1.0
        else:
            tally.sparse_calls += 1
            if isinstance(density, torch.Tensor):
                before = self._unread.get(site)
                self._unread[site] = density if before is None else before.to(density.device) + density
            else:
                tally.kept += density
        if site.refusal is not None:
            if tally.path not in self._fallbacks:
                warnings.warn(f"dit_accel: {tally.path} runs dense: {site.refusal}", stacklevel=2)
            self._fallbacks[tally.path] = site.refusal
            site.refusal = None

    def _plan_density(self) -> float | None:
        """Mean over the plans of a static method, over the sparse calls of a dynamic one."""
        plans = [plan.density for plan in self._plans.values()]
        if isinstance(self.processor, DynamicAttnProcessor):
            sparse = sum(tally.sparse_calls for tally in self._tally.values())
            dense = sum(tally.dense_calls for tally in self._tally.values())
            return (sum(tally.kept for tally in self._tally.values()) - dense) / sparse if sparse else None
        return sum(plans) / len(plans) if plans else None

    def _plan(self, site: Site, layout: TokenLayout, device: torch.device) -> SparsePlan:
        assert isinstance(self.processor, StaticAttnProcessor)  # the other kind is asked at each site
        recipe = self.processor.for_site(site.info)
        key = (recipe, layout, device)
        if key not in self._plans:
            while len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = recipe.build_plan(layout, device)
        return self._plans[key]


def accelerate(
    target: Any,
    attention: str | SparseAttnProcessor | None = None,
    *,
    controls: Sequence[AttentionControl] = (),
    block_hooks: Sequence[BlockHook] = (),
    token_order: OrderFor | None = None,
    **settings: Any,
) -> Acceleration:
    """Accelerates a pipeline or a bare transformer in place.

    Args:
        target: a diffusers pipeline, or its transformer or UNet.
        attention: a method's name such as ``"radial"``, one of :mod:`dit_accel.processors`, or None to leave attention
            as it is (with controls or hooks alone).
        controls: attention controls, in the order in which they act.
        block_hooks: hooks around every transformer block, outermost first.
        token_order: gives the order in which the blocks have their video tokens, see
            :class:`dit_accel.install.TokenPermutation`; None for frame by frame, row by row.
        **settings: settings of the method, when given by name.

    Returns:
        a handle with ``report()`` and ``remove()``; also a context manager.

    Raises:
        UnknownModelError: if the model is of no registered family.
        ValueError: for bad settings, a method that does nothing for the model, a control that acts nowhere, a target
            accelerated already, or one that is compiled already.
    """
    from .processors import processor_by_name

    if isinstance(attention, str):
        attention = processor_by_name(attention, **settings)
    elif settings:
        raise ValueError(f"settings {sorted(settings)} belong to a method given by name; give them to the processor")
    if attention is not None and not is_ours(attention):
        raise ValueError(
            "attention is a method's name or a dit_accel processor, that is a StaticAttnProcessor or "
            f"DynamicAttnProcessor; got {type(attention).__name__}"
        )
    if token_order is not None:
        block_hooks = (TokenPermutation(token_order), *block_hooks)
    return Acceleration(target, attention, controls, block_hooks)


def is_ours(processor: object) -> bool:
    """Whether an object is one of our recipes."""
    return isinstance(processor, (StaticAttnProcessor, DynamicAttnProcessor))


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


def find_roots(target: Any) -> dict[str, nn.Module]:
    """The transformers or UNets of a pipeline by attribute name, or the model itself as ``"model"``.

    Raises:
        UnknownModelError: if there is none of a registered family.
    """
    candidates = {"model": target} if isinstance(target, nn.Module) else dict(getattr(target, "components", {}))
    for name, module in candidates.items():
        if hasattr(module, "_orig_mod"):
            raise ValueError(f"{name} is compiled already; accelerate it first, then call its compile()")
    roots = {name: module for name, module in candidates.items() if isinstance(module, nn.Module) and is_known(module)}
    if not roots:
        models = [candidates[name] for name in ("transformer", "unet", "model") if candidates.get(name) is not None]
        if models:
            family_of(models[0])
        raise UnknownModelError(f"{type(target).__name__} is neither a diffusers pipeline nor a model dit_accel knows")
    return roots
