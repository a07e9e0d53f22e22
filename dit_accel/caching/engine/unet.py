"""DeepCache (arXiv 2312.00858) on a UNet of diffusers: its inner part is skipped, and what it gave last is put back.

The skip connections are numbered from the outside: 0 is what ``conv_in`` gave, 1 what the first layer of the first
down block gave, and so on; a layer is a residual block with the attention behind it, or a downsampler. The up layer
that takes skip connection ``j`` has number ``j``, too. With branch ``b`` the first ``b`` down layers and the up layers
``b`` to 0 always run; the feature that enters up layer ``b`` is kept, and all that only serves to make it is skipped.

Nothing of the model is copied: the UNet's own submodules are wrapped, and skipped ones give placeholders that nobody
reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...install.forward import Around, wrap_forward

if TYPE_CHECKING:
    from ...install import RootInstallation
    from ..unit import Unit
    from .cache_engine import CacheEngine

#: Told what enters the inner part; gives the feature to put back (which the model may write into), or None to compute.
Ask = Callable[[Tensor], Tensor | None]
#: Given the feature that was computed; the model may write into it later, so what is kept is a copy.
Keep = Callable[[Tensor], None]

_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_MIDDLE = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")


@dataclass(frozen=True)
class _Stage:
    """A down or up block, and the numbers of its layers.

    Attributes:
        block: the module.
        low: lowest number, that of its outermost layer.
        high: highest number.
    """

    block: Any
    low: int
    high: int


def deep_branches(root: Any) -> int:
    """How many branches a UNet has: its skip connections, numbered from 0.

    Raises:
        ValueError: if one of its blocks is of a kind that we do not know.
    """
    return _down_stages(root)[-1].high + 1 + (root.mid_block is not None)


def install_deep(root: Any, branch: int, ask: Ask, keep: Keep) -> Callable[[], None]:
    """Puts the hooks on a UNet.

    Args:
        root: a ``UNet2DConditionModel`` whose blocks are plain or have cross-attention (SD 1.5, SD 2, SDXL).
        branch: number of the skip connection where the cut is made, from 0; the greater, the more layers always run.
        ask: called once per call of the UNet, when its inner part is entered.
        keep: called once per call in which the inner part was computed.

    Returns:
        a function that takes them off again.

    Raises:
        ValueError: for an unknown kind of block, or a branch that the UNet does not have.
    """
    check_deep(root, branch)
    cut = _Cut(ask, keep)
    undo: list[Callable[[], None]] = []

    def wrap(module: nn.Module, around: Around) -> None:
        undo.append(wrap_forward(module, around))

    try:
        for module, around in [*_down_hooks(root, branch, cut), *_up_hooks(root, branch, cut)]:
            wrap(module, around)
    except BaseException:
        _undo_all(undo)
        raise
    return lambda: _undo_all(undo)


def attach_deep(engine: CacheEngine, installed: RootInstallation, unit: Unit) -> Callable[[], None]:
    """Lets an engine act on the inside of a UNet; returns what undoes it."""
    return install_deep(
        installed.root,
        unit.first,
        lambda entered: engine.enter_value(unit, entered),
        lambda feature: engine.leave_value(unit, feature),
    )


def check_deep(root: Any, branch: int) -> None:
    """Refuses what :func:`install_deep` cannot cut, naming the valid range.

    Raises:
        ValueError: for an unknown kind of block, or a branch that the UNet does not have.
    """
    count = deep_branches(root)
    layers = sum(len(block.resnets) for block in root.up_blocks)
    if layers != _down_stages(root)[-1].high + 2:
        raise ValueError(f"{type(root).__name__} has {layers} up layers, which do not match its skip connections")
    if isinstance(branch, bool) or not isinstance(branch, int) or not 0 <= branch < count:
        raise ValueError(
            f"branch is the number of a skip connection of {type(root).__name__}, 0 to {count - 1}; got {branch!r}"
        )


def skipped_paths(root: Any, branch: int) -> tuple[str, ...]:
    """Names of the modules that are skipped, each with a dot behind it."""
    unused = _Cut(lambda entered: None, lambda feature: None)
    hooks = [*_down_hooks(root, branch, unused), *_up_hooks(root, branch, unused)]
    entered = next(stage.block for stage in _up_stages(root) if stage.low <= branch <= stage.high)
    skipped = {module for module, _ in hooks if module is not entered}
    return tuple(f"{name}." for name, module in root.named_modules() if module in skipped)


def _undo_all(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


class _Cut:
    """What the hooks share within one call of the UNet.

    Attributes:
        feature: what is put back; None while the inner part is computed.
    """

    def __init__(self, ask: Ask, keep: Keep) -> None:
        self._ask, self._keep = ask, keep
        self.feature: Tensor | None = None
        self._dot: Tensor | None = None
        self._shapes: dict[nn.Module, torch.Size] = {}

    def begin(self, entered: Tensor) -> None:
        """The first part that may be skipped is entered."""
        self.feature = self._ask(entered)
        self._dot = None if self.feature is None else entered.new_zeros(1, 1, 1, 1)

    def end(self, feature: Tensor) -> None:
        """The feature was computed."""
        self._keep(feature)

    @property
    def dot(self) -> Tensor:
        """Placeholder of one number: residuals of a ControlNet or adapter can be added to it."""
        assert self._dot is not None
        return self._dot

    def remember(self, block: nn.Module, sample: Tensor) -> None:
        """Notes the shape of what a block gave."""
        self._shapes[block] = sample.shape

    def like(self, block: nn.Module) -> Tensor:
        """Placeholder of the shape that a block gives: a T2I adapter writes into what a plain down block gave."""
        if self.feature is None or block not in self._shapes:
            return self.dot
        return self.dot.new_zeros(len(self.feature), *self._shapes[block][1:])  # the batch may have been halved

    def hollow(self) -> Tensor:
        """Placeholder of one channel ``[batch, 1, height, width]``, so that joining several costs next to nothing."""
        assert self.feature is not None
        batch, _, height, width = self.feature.shape
        return self.feature.new_zeros(batch, 1, height, width)  # FreeU cannot transform a tensor without channels


_Hooks = list[tuple[nn.Module, Around]]


def _down_hooks(root: Any, branch: int, cut: _Cut) -> _Hooks:
    """Those of the way down and of the middle; the first one in execution order opens the cut."""
    hooks: _Hooks = []
    for stage in _down_stages(root):
        if stage.low >= branch:
            hooks.append((stage.block, _skip_down_block(stage, cut, first=stage.low == branch)))
        else:
            hooks += _skip_down_layers(stage, branch, cut)
    if root.mid_block is not None:
        hooks.append((root.mid_block, _skip(cut, lambda: cut.dot, first=not hooks)))
    return hooks


def _skip_down_layers(stage: _Stage, branch: int, cut: _Cut) -> _Hooks:
    """The layers of one down block from number ``branch`` on."""
    hooks: _Hooks = []
    for number, modules in enumerate(_down_layers(stage.block), start=stage.low):
        if number < branch:
            continue
        for place, module in enumerate(modules):
            is_attention = module in list(getattr(stage.block, "attentions", ()))
            give = (lambda: (cut.dot,)) if is_attention else (lambda: cut.dot)
            hooks.append((module, _skip(cut, give, first=number == branch and place == 0)))
    return hooks


def _up_hooks(root: Any, branch: int, cut: _Cut) -> _Hooks:
    hooks: _Hooks = []
    for stage in _up_stages(root):
        if stage.low > branch:
            hooks.append((stage.block, _skip(cut, lambda: cut.dot)))
        elif stage.high >= branch:
            hooks += [(stage.block, _enter_up_block(stage, branch, cut)), *_skip_up_layers(stage, branch, cut)]
    return hooks


def _skip_up_layers(stage: _Stage, branch: int, cut: _Cut) -> _Hooks:
    """The layers above number ``branch`` of the block that is cut; the last of them gives the feature."""
    hooks: _Hooks = []
    attentions = list(getattr(stage.block, "attentions", ()))
    count = stage.high - branch
    for place in range(count):
        modules = [stage.block.resnets[place], *attentions[place : place + 1]]
        for module in modules:
            is_last = place == count - 1 and module is modules[-1]
            hooks.append((module, _skip_up(cut, module in attentions, is_last)))
    return hooks


def _skip(cut: _Cut, give: Callable[[], Any], first: bool = False) -> Around:
    """Runs a module, or gives a placeholder."""

    def around(run: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if first:
            cut.begin(_entered(args, kwargs))
        return run() if cut.feature is None else give()

    return around


def _skip_down_block(stage: _Stage, cut: _Cut, first: bool) -> Around:
    count = stage.high - stage.low + 1

    def around(run: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if first:
            cut.begin(_entered(args, kwargs))
        if cut.feature is not None:
            return cut.like(stage.block), (cut.dot,) * count
        sample, skips = run()
        if not getattr(stage.block, "has_cross_attention", False):
            cut.remember(stage.block, sample)
        return sample, skips

    return around


def _skip_up(cut: _Cut, is_attention: bool, is_last: bool) -> Around:
    def around(run: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if cut.feature is None:
            output = run()
            if is_last:
                cut.end(output[0] if is_attention else output)
            return output
        given = cut.feature if is_last else cut.hollow()
        return (given,) if is_attention else given

    return around


def _enter_up_block(stage: _Stage, branch: int, cut: _Cut) -> Around:
    """The block with the first up layer that runs: the feature enters here, or further inside."""

    def around(run: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if cut.feature is None:
            if stage.high == branch:
                cut.end(kwargs["hidden_states"])
            return run()
        # run() passes on this very mapping.
        kwargs["hidden_states"] = cut.feature if stage.high == branch else cut.hollow()
        kwargs["res_hidden_states_tuple"] = tuple(
            skip if number <= branch else cut.hollow()
            for number, skip in enumerate(kwargs["res_hidden_states_tuple"], start=stage.low)
        )
        return run()

    return around


def _entered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    entered: Tensor = args[0] if args else kwargs["hidden_states"]
    return entered


def _down_layers(block: Any) -> list[list[nn.Module]]:
    """The modules of every layer of a down block; its downsampler is the last layer."""
    attentions = list(getattr(block, "attentions", ()))
    layers = [[resnet, *attentions[place : place + 1]] for place, resnet in enumerate(block.resnets)]
    return layers + ([list(block.downsamplers)] if block.downsamplers else [])


def _down_stages(root: Any) -> list[_Stage]:
    stages: list[_Stage] = []
    low = 0
    for path, block in enumerate(root.down_blocks):
        _check_kind(block, f"down_blocks.{path}", _DOWN)
        high = low + len(_down_layers(block)) - 1
        stages.append(_Stage(block, low, high))
        low = high + 1
    if root.mid_block is not None:
        _check_kind(root.mid_block, "mid_block", _MIDDLE)
    return stages


def _up_stages(root: Any) -> list[_Stage]:
    """From the inside to the outside, as they run."""
    stages: list[_Stage] = []
    low = 0
    for path, block in reversed(list(enumerate(root.up_blocks))):
        _check_kind(block, f"up_blocks.{path}", _UP)
        stages.insert(0, _Stage(block, low, low + len(block.resnets) - 1))
        low += len(block.resnets)
    return stages


def _check_kind(block: nn.Module, path: str, known: tuple[str, ...]) -> None:
    if not any(base.__name__ in known for base in type(block).__mro__):
        raise ValueError(
            f"the inner part of a UNet can be skipped where its blocks are {' or '.join(known)}; {path} is "
            f"{type(block).__name__}. Use the scope Output, or cache its attention"
        )
