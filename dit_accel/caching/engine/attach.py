"""Puts a cache on one model: around its forward, its blocks or the modules in them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...families.streams import modulated_input, pack_streams, read_streams, streams_of, unpack_streams
from ...install.forward import wrap_forward
from ..policies.base import Moment
from ..record import share_of
from ..scopes.base import RootView

if TYPE_CHECKING:
    from ...install import RootInstallation
    from ..unit import Unit
    from .cache_engine import CacheEngine

Run = Callable[[], Any]
Undo = Callable[[], None]
_LATENTS = ("hidden_states", "sample")
_ENTERED = ("hidden_states", "x", "sample", "input", "query")  # what the main input of a module is called


def attach(engine: CacheEngine, installed: RootInstallation) -> list[Undo]:
    """Lets an engine act on a root.

    Args:
        engine: of one cache.
        installed: the root, its family and its blocks.

    Returns:
        what undoes it, to be called in reverse order.

    Raises:
        ValueError: if the model has no part that the cache could skip, or the policy cannot be asked in time.
    """
    if getattr(installed.root, "is_cache_enabled", False):
        raise ValueError(
            f"a cache of diffusers is on {type(installed.root).__name__}, and two would not know of each other; call "
            "its disable_cache() first"
        )
    view = view_of(installed)
    units = engine.cache.scope.units(view)
    if not units:
        raise ValueError(
            f"{engine.cache.scope!r} finds nothing to skip in {view.name}; choose another scope or preset"
        )
    _check_moment(engine, units, view)
    engine.declare(installed.expert, units, {unit.key: _share(unit, len(view.blocks)) for unit in units})
    undo: list[Undo] = []
    try:
        _attach_all(engine, installed, view, units, undo)
    except BaseException:
        while undo:
            undo.pop()()
        raise
    return undo


def view_of(installed: RootInstallation) -> RootView:
    """What scopes may look at."""
    root, family = installed.root, installed.family
    blocks = tuple(path for path, _ in installed.blocks())
    is_unet = "up_blocks" in family.block_lists
    kinds = {site.info.path: site.info.kind for site in installed.sites.values()}
    inside = tuple(f"{path}." for path in blocks)
    modules = [
        (path, kinds.get(path, "mlp"))
        for path, _ in root.named_modules()
        if path.startswith(inside) and (path in kinds or path.rpartition(".")[2] in family.mlp_names)
    ]
    return RootView(root, type(root).__name__, blocks, tuple(sorted(modules, key=_in_order(blocks))), is_unet)


def _in_order(blocks: tuple[str, ...]) -> Callable[[tuple[str, str]], int]:
    """Sorts modules by their block: a UNet lists its middle after its end."""
    place = {block: index for index, block in enumerate(blocks)}

    def key(module: tuple[str, str]) -> int:
        parts = module[0].split(".")
        return next(place[head] for size in (1, 2) if (head := ".".join(parts[:size])) in place)

    return key


def _share(unit: Unit, blocks: int) -> float | None:
    return share_of(unit, blocks)


def _check_moment(engine: CacheEngine, units: tuple[Unit, ...], view: RootView) -> None:
    policy, first = engine.cache.policy, units[0]
    name = type(policy).__name__
    if first.kind == "output" and policy.moment is not Moment.CALL:
        raise ValueError(
            f"{name} decides inside the model, when the scope Output must have decided already; take a policy that "
            "looks at latents or steps, or a scope of blocks"
        )
    if policy.moment in (Moment.INPUT, Moment.PROBE) and (view.is_unet or not view.blocks):
        raise ValueError(f"{name} looks at transformer blocks, which {view.name} does not have")
    if policy.moment is Moment.PROBE:
        reach = min((unit.first for unit in units if unit.kind == "blocks"), default=len(view.blocks))
        if not 0 < policy.probe_blocks <= reach or policy.probe_blocks >= len(view.blocks):
            raise ValueError(
                f"{name} probes with the first {policy.probe_blocks} blocks, and the scope skips from block {reach} "
                f"on, of {len(view.blocks)}; probe with 1 to {min(reach, len(view.blocks) - 1)} blocks"
            )


def _attach_all(
    engine: CacheEngine, installed: RootInstallation, view: RootView, units: tuple[Unit, ...], undo: list[Undo]
) -> None:
    blocks = installed.blocks()
    spans = [unit for unit in units if unit.kind == "blocks"]
    around = [_BlockSeam(engine, installed, index) for index in range(len(blocks))]
    for unit in spans:
        for index in range(unit.first, unit.last + 1):
            around[index].unit = unit
    _mark_moments(engine, around)
    for index, seam in enumerate(around):
        if seam.acts:
            seam.prepare(*blocks[index])
            undo.append(wrap_forward(blocks[index][1], seam))
    for unit in units:
        if unit.is_module:
            module = installed.root.get_submodule(unit.path)
            undo.append(wrap_forward(module, functools.partial(_around_module, engine, unit)))
    for unit in units:
        if unit.kind == "deep":
            from .unet import attach_deep

            undo.append(attach_deep(engine, installed, unit))
        elif unit.kind == "guidance":
            from .guidance import attach_guidance

            undo.append(attach_guidance(engine, installed, unit))
    undo.append(wrap_forward(installed.root, _root_seam(engine, installed), whole=True))


def _mark_moments(engine: CacheEngine, around: list[_BlockSeam]) -> None:
    policy = engine.cache.policy
    if policy.moment in (Moment.INPUT, Moment.PROBE):
        around[0].is_first = True
    if policy.moment is Moment.PROBE:
        around[policy.probe_blocks].ends_probe = True


class _BlockSeam:
    """Around one block: tells the engine what passes, and stands in for the block if its unit is skipped."""

    def __init__(self, engine: CacheEngine, installed: RootInstallation, index: int) -> None:
        self._engine, self._installed, self._index = engine, installed, index
        self.unit: Unit | None = None
        self.is_first = self.ends_probe = False

    @property
    def acts(self) -> bool:
        return self.unit is not None or self.is_first or self.ends_probe

    def prepare(self, path: str, block: nn.Module) -> None:
        self._block = block
        self._streams = streams_of(self._installed.family, path)
        names = self._streams.names
        self._main = names.index("hidden_states") if "hidden_states" in names else 0

    def __call__(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._engine.is_open:  # the block was called outside its root
            return run()
        entered = read_streams(self._block, self._streams, args, kwargs)
        main = entered[self._main]
        if self.is_first:
            self._engine.at_first_block(main, lambda: self._modulated(args, kwargs))
        if self.ends_probe:
            self._engine.at_probe_end(main)
        return run() if self.unit is None else self._in_unit(self.unit, run, entered, main)

    def _in_unit(self, unit: Unit, run: Run, entered: tuple[Tensor | None, ...], main: Tensor | None) -> Any:
        if self._index == unit.first:
            self._engine.enter(unit, entered, main)
        is_last = self._index == unit.last
        if self._engine.is_skipping(unit):
            return pack_streams(self._streams, self._engine.stand_in(unit) if is_last else entered)
        output = run()
        if is_last:
            self._engine.leave(unit, unpack_streams(self._streams, output), self._main)
        return output

    def _modulated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        family, root, name = self._installed.family, self._installed.root, self._engine.cache.policy.signal
        return modulated_input(family, root, self._engine.arguments, self._block, args, kwargs, name)


def _around_module(engine: CacheEngine, unit: Unit, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inputs = [*args, *(kwargs[name] for name in _ENTERED if name in kwargs)]
    entered = next((part for part in inputs if isinstance(part, Tensor)), None)
    return engine.around_module(unit, run, entered)


def _root_seam(engine: CacheEngine, installed: RootInstallation) -> Callable[..., Any]:
    root, signature = installed.root, inspect.signature(type(installed.root).forward)

    def around(run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments: Mapping[str, Any] = signature.bind_partial(root, *args, **kwargs).arguments
        latents = next((arguments[name] for name in _LATENTS if isinstance(arguments.get(name), Tensor)), None)
        if latents is None:
            raise ValueError(
                f"{type(root).__name__} was called without {' or '.join(_LATENTS)}, so a cache cannot see its latents"
            )
        return engine.around_root(run, dict(arguments), latents)

    return around
