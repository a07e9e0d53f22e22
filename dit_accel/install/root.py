"""Everything we put on one root model, and its exact removal."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..clock import StepClock, StepState
from ..controls import AttentionControl, SiteInfo
from ..families import Family, family_of
from .blocks import BlockHook, BlockInfo, wrap_block
from .interception import BoundProcessor, Seat, bind
from .permutation import PermutedStack, permuted_stack
from .site import Site

BeforeCall = Callable[["RootInstallation", StepState], None]
AfterCall = Callable[["RootInstallation"], None]
AfterGeneration = Callable[[], None]


class RootInstallation:
    """The three seams on one root: step (its calls), block, attend.

    Args:
        root: transformer or UNet.
        expert: attribute name of the root in its pipeline.
        clock: told of every call of the root.
        controls: attention controls.
        kinds: kinds of sites that a method acts on; none without one.
        block_hooks: hooks around every block; a token permutation among them acts on all of them together.
        check_idle: raises RuntimeError while a call is running that no other may come into.
        before_call: runs before each call of the root, outside compiled code; prepares the sites.
        after_call: runs after it, also if it fails.
        after_generation: runs when a pipeline says that it has ended, also if no step was the last one.

    Raises:
        UnknownModelError: if the family of the root is not registered.
        ValueError: if no attention module was found, or none that a control chooses, or a processor has weights and is
            not that of a cross-attention on which nothing acts.
    """

    def __init__(
        self,
        root: nn.Module,
        expert: str,
        clock: StepClock,
        controls: tuple[AttentionControl, ...],
        kinds: Collection[str],
        block_hooks: tuple[BlockHook, ...],
        check_idle: Callable[[], None],
        before_call: BeforeCall,
        after_call: AfterCall,
        after_generation: AfterGeneration,
    ) -> None:
        self.root: Any = root
        self.expert, self.clock = expert, clock
        self.family: Family = family_of(root)
        self._before_call, self._after_call, self._after_generation = before_call, after_call, after_generation
        self._check_idle, self._kinds = check_idle, tuple(kinds)
        self._signature = inspect.signature(type(root).forward)
        self._outside = False  # whether the clock is kept by the wrapper of compiled code, not by the hooks inside it
        self._undo: list[Callable[[], None]] = []
        self._uncompilable: str | None = None
        self._stack: PermutedStack | None = None
        self.device = torch.device("cpu")  # where the latest call runs
        self._refused: set[int] = set()  # threads whose call was not let in
        self._seat = Seat()
        if getattr(root, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{type(root).__name__} is compiled already; accelerate it first, then call its compile()"
            )
        self.sites: dict[nn.Module, Site] = self._find_sites(controls)
        try:
            self._install(block_hooks)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes everything off again, in reverse order; safe to call twice."""
        while self._undo:
            self._undo.pop()()
        for site in self.sites.values():
            site.forget()

    def attach(self, undo: Sequence[Callable[[], None]], uncompilable: str) -> None:
        """Takes over what was put on the root besides, to be removed with it.

        Args:
            undo: removes it, called in reverse order.
            uncompilable: why the root cannot be compiled as a whole with it, and what can.
        """
        self._undo += undo
        self._uncompilable = uncompilable

    def replaced(self) -> list[str]:
        """Paths of sites where a method or a control acts and someone has since put another processor."""
        return [
            site.info.path
            for module, site in self.sites.items()
            if self._is_acted_on(site)
            and not (isinstance(module.processor, BoundProcessor) and module.processor.site is site)
        ]

    def heads_of(self, kinds: Collection[str]) -> dict[SiteInfo, tuple[int, int]]:
        """Heads and head dimension of every site of some kinds."""
        modules: dict[SiteInfo, Any] = {site.info: m for m, site in self.sites.items() if site.info.kind in kinds}
        return {info: (module.heads, module.inner_dim // module.heads) for info, module in modules.items()}

    def _install(self, block_hooks: tuple[BlockHook, ...]) -> None:
        for module, site in self.sites.items():
            self._bind(module, site)
        self._stack, block_hooks = permuted_stack(block_hooks, self.root, self.family)
        if self._stack is not None:
            self._undo.append(self._stack.remove)
        if block_hooks:
            blocks = self.blocks()
            for index, (path, block) in enumerate(blocks):
                info = BlockInfo(path, index, len(blocks), self.expert)
                self._undo.append(wrap_block(block, info, self.clock, block_hooks))
        self._undo.append(self.root.register_forward_pre_hook(self._on_call, with_kwargs=True).remove)
        self._undo.append(self.root.register_forward_hook(self._on_return, always_call=True).remove)
        self._shadow("compile", self._compile)
        self._shadow("_reset_stateful_cache", self._reset)
        if hasattr(self.root, "cache_context"):
            self._shadow("cache_context", self._cache_context)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Path and module of every block in execution order."""
        blocks: list[tuple[str, nn.Module]] = []
        for name in self.family.block_lists:
            found = getattr(self.root, name)
            if isinstance(found, (nn.ModuleList, nn.Sequential)):
                blocks += [(f"{name}.{index}", block) for index, block in enumerate(found)]
            elif found is not None:  # the middle of a UNet; some have none
                blocks.append((name, found))
        return blocks

    def _find_sites(self, controls: tuple[AttentionControl, ...]) -> dict[nn.Module, Site]:
        found = self._attention_modules()
        counts = Counter(kind for _, _, kind in found)
        if not counts:
            raise ValueError(f"no attention module was found in {type(self.root).__name__}")
        sites: dict[nn.Module, Site] = {}
        seen: Counter[str] = Counter()
        for path, module, kind in found:
            info = SiteInfo(path, kind, seen[kind], counts[kind], self.expert)
            sites[module] = Site(info, tuple(control for control in controls if control.acts_on(info)))
            seen[kind] += 1
        for control in controls:
            if not any(control in site.controls for site in sites.values()):
                raise ValueError(
                    f"{type(control).__name__} acts nowhere: {type(self.root).__name__} has "
                    f"{', '.join(f'{count} {kind}' for kind, count in counts.items())} attention sites; "
                    "choose its kinds and layers among them"
                )
        return sites

    def _attention_modules(self) -> list[tuple[str, nn.Module, str]]:
        """Path, module and kind of every site in execution order: a UNet lists its middle after its end."""
        from diffusers.models.attention import AttentionModuleMixin
        from diffusers.models.attention_processor import Attention, MochiAttention

        def place(site: tuple[str, nn.Module, str]) -> int:
            return next((i for i, name in enumerate(self.family.block_lists) if site[0].startswith(f"{name}.")), -1)

        found = [
            (path, module, kind)
            for path, module in self.root.named_modules()
            if isinstance(module, (Attention, AttentionModuleMixin, MochiAttention))
            and (kind := self.family.site_kind(path, module)) is not None
        ]
        return sorted(found, key=place)

    def _is_acted_on(self, site: Site) -> bool:
        return bool(site.controls) or site.info.kind in self._kinds

    def _bind(self, module: Any, site: Site) -> None:
        stock = module.processor
        if isinstance(stock, BoundProcessor):
            raise ValueError(f"{site.info.path} is accelerated already; call remove() on its handle first")
        if isinstance(stock, nn.Module) and site.info.kind == "cross" and not self._is_acted_on(site):
            return  # IP-Adapters have their weights here, and nobody wants anything of it
        if isinstance(stock, nn.Module):
            raise ValueError(
                f"{type(stock).__name__} at {site.info.path} has weights of its own (as IP-Adapters have), and "
                "dit_accel cannot stand in its place; unload the adapter first"
            )
        bound = bind(stock, site, self._seat)
        module.processor = bound
        self._undo.append(functools.partial(_put_back, module, bound, stock))

    def _on_call(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._outside:
            self._begin(args, kwargs)

    def _on_return(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._outside:
            self._end()

    @torch.compiler.disable
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments: Mapping[str, Any] = self._signature.bind_partial(self.root, *args, **kwargs).arguments
        self._refuse_second()
        self.device = _device_of(self.root, arguments)
        layout = self.family.layout(self.root, arguments)
        if self._stack is not None:
            layout = self._stack.begin(layout, self.device)
        padding = self.family.padding(self.root, arguments)
        for site in self.sites.values():
            site.set_tokens(self.family.site_layout(self.root, site.info.path, layout), padding)
        self._before_call(self, self.clock.tick(self.expert, layout, arguments))

    def _refuse_second(self) -> None:
        """A call of another thread must not touch what the running one is told."""
        try:
            self._check_idle()
        except RuntimeError:
            self._refused.add(threading.get_ident())
            raise

    def _end(self) -> None:
        if self._refused and threading.get_ident() in self._refused:
            self._refused.discard(threading.get_ident())
            return
        if self._stack is not None:
            self._stack.rest()
        self._after_call(self)

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """As ``nn.Module.compile``, with the clock kept outside the compiled code.

        Raises:
            ValueError: if something is on the root that decides inside of it.
        """
        if self._uncompilable is not None:
            raise ValueError(self._uncompilable)
        compiled = torch.compile(self.root._call_impl, *args, **kwargs)

        def call(*call_args: Any, **call_kwargs: Any) -> Any:
            self._begin(call_args, call_kwargs)
            self._outside = True
            try:
                return compiled(*call_args, **call_kwargs)
            finally:
                self._outside = False
                self._end()

        self.root._compiled_call_impl = call
        self._undo.append(lambda: setattr(self.root, "_compiled_call_impl", None))

    def _reset(self, *args: Any, **kwargs: Any) -> None:
        """What pipelines call on all their models when they are done (``maybe_free_model_hooks``)."""
        stock = getattr(type(self.root), "_reset_stateful_cache", None)
        if stock is not None:
            stock(self.root, *args, **kwargs)
        self._after_generation()

    @contextlib.contextmanager
    def _cache_context(self, name: str, **fields: Any) -> Iterator[Any]:
        """A method, not a closure: a deep copy of the root is to lead to its own clock."""
        self.clock.push_context(name, fields.get("step_index"), fields.get("num_inference_steps"))
        try:
            with type(self.root).cache_context(self.root, name, **fields) as inner:
                yield inner
        finally:
            self.clock.pop_context()

    def _shadow(self, name: str, replacement: Callable[..., Any]) -> None:
        """Hides a method of the root behind an attribute of this one instance."""
        if name in vars(self.root):
            raise ValueError(f"{type(self.root).__name__}.{name} was replaced by someone else; remove that first")
        object.__setattr__(self.root, name, replacement)
        self._undo.append(functools.partial(self._unshadow, name))

    def _unshadow(self, name: str) -> None:
        vars(self.root).pop(name, None)


def _device_of(root: nn.Module, arguments: Mapping[str, Any]) -> torch.device:
    """Where a call will run: weights that are offloaded are on the CPU, or nowhere, until they are needed."""
    weight = next(root.parameters()).device
    if weight.type not in ("cpu", "meta"):
        return weight
    told = getattr(getattr(root, "_hf_hook", None), "execution_device", None)
    if told is not None:
        return torch.device(told)
    return next((each.device for each in arguments.values() if isinstance(each, torch.Tensor)), weight)


# What undoes something is no closure: a deep copy of a model is to have one that acts on the copy.
def _put_back(module: Any, bound: BoundProcessor, stock: Any) -> None:
    if module.processor is bound:  # else someone has put another processor there, and wants it
        bound.give_settings()
        module.processor = stock
