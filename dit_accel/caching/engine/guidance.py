"""Skips the unconditional branch of guidance: its prediction is made from that of the conditional one.

CFG-Cache (FasterCache, arXiv 2410.19355): where both branches are computed, their difference is kept. Where the
unconditional one is skipped, it is the conditional one plus that difference, whose low and high spatial frequencies
have grown by a factor at each step since. T-GATE (arXiv 2404.02747): behind the gate both are the same.

Branches called one by one are told apart by the names that the pipeline gives; of a batch that holds both, only the
second half is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...install.forward import innermost_forward, wrap_forward
from ..policies.broadcast import TIMESTEPS
from ..scopes.guidance import Guidance
from .rows import holds_both_branches, second_half

if TYPE_CHECKING:
    from ...clock import StepState
    from ...install import RootInstallation
    from ..unit import Unit
    from .cache_engine import CacheEngine

Run = Callable[[], Any]
#: Arguments of roots that hold one row per token, not per batch entry.
_BY_TOKEN = frozenset({"img_ids", "txt_ids", "image_rotary_emb", "rotary_emb"})


def attach_guidance(engine: CacheEngine, installed: RootInstallation, unit: Unit) -> Callable[[], None]:
    """Lets an engine with a :class:`Guidance` scope act on a root; returns what undoes it.

    Raises:
        ValueError: if branches were to decide together, when the skipped one is never asked.
    """
    if engine.cache.decide != "each":
        raise ValueError('the scope Guidance acts on one branch alone; give the Cache decide="each"')
    return wrap_forward(installed.root, _GuidanceSeam(engine, installed, unit), whole=True)


def low_frequencies(height: int, width: int) -> Tensor:
    """Mask ``[height, width]`` of a spectrum with its origin in the middle: a disk of a fifth of the shorter side."""
    radius = min(height, width) // 5
    down, across = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    return down[:, None] ** 2 + across[None, :] ** 2 <= radius**2


def scale_frequencies(difference: Tensor, low: float, high: float) -> Tensor:
    """Multiplies low and high spatial frequencies of ``[..., height, width]``."""
    if low == high:
        return difference * low
    mask = torch.fft.ifftshift(low_frequencies(*difference.shape[-2:])).to(difference.device)
    spectrum = torch.fft.fft2(difference.float())
    scaled: Tensor = torch.fft.ifft2(torch.where(mask, low * spectrum, high * spectrum)).real
    return scaled


@dataclass
class _Growth:
    """What the kept difference of one branch has grown to.

    Attributes:
        low: factor on low frequencies.
        high: factor on high ones.
        unit: what one timestep of training is in numbers of the model.
    """

    low: float = 1.0
    high: float = 1.0
    unit: float = 1.0


class _GuidanceSeam:
    """Around the forward of a root."""

    def __init__(self, engine: CacheEngine, installed: RootInstallation, unit: Unit) -> None:
        assert isinstance(engine.cache.scope, Guidance)
        self._engine, self._unit, self._scope = engine, unit, engine.cache.scope
        self._root, self._forward = installed.root, innermost_forward(installed.root)
        self._signature = inspect.signature(type(installed.root).forward)
        self._growth: dict[str, _Growth] = {}  # by branch
        self._conditional: tuple[tuple[int, int], Any] | None = None  # generation and step, and the output

    def __call__(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._engine.clock.state
        if not self._engine.is_open or state is None:
            return run()
        if state.branch == "cond":
            output = run()
            if self._engine.clock.is_guided() is not False:  # else nobody will ask for it
                self._conditional = ((state.generation, state.step), output)
            return output
        if state.branch == "uncond":
            return self._alone(run, state)
        bound = self._signature.bind(self._root, *args, **kwargs)
        if not holds_both_branches(self._engine.latents, self._engine.clock.is_guided()):
            return run()
        return self._together(run, bound, state)

    def _alone(self, run: Run, state: StepState) -> Any:
        """The unconditional branch in a call of its own, behind the conditional one."""
        partner, self._conditional = self._conditional, None
        if partner is None or partner[0] != (state.generation, state.step):
            return run()
        conditional = partner[1]
        kept = self._engine.enter_value(self._unit, self._engine.latents)
        if kept is None:
            output = run()
            self._keep(_main(output), _main(conditional), state)
            return output
        return _with_main(conditional, self._unconditional(_main(conditional), kept, state))

    def _together(self, run: Run, bound: inspect.BoundArguments, state: StepState) -> Any:
        """A batch that holds both branches."""
        self._refuse_blocks(state)
        batch = len(self._engine.latents)
        kept = self._engine.enter_value(self._unit, self._engine.latents)
        if kept is None:
            output = run()
            unconditional, conditional = _main(output).chunk(2)
            self._keep(unconditional, conditional, state)
            return output
        for name in bound.arguments:
            if name not in _BY_TOKEN and name != "self":
                bound.arguments[name] = second_half(bound.arguments[name], batch)
        output = self._forward(*bound.args[1:], **bound.kwargs)
        conditional = _main(output)
        unconditional = self._unconditional(conditional, kept, state)
        return _with_main(output, torch.cat([unconditional, conditional]))

    def _refuse_blocks(self, state: StepState) -> None:
        """Residuals of blocks, and what policies measure on them, are of one batch; ours changes from call to call."""
        others = (unit for other in self._engine.others for unit in other.units[state.expert])
        if any(unit.kind == "blocks" for unit in others):
            raise ValueError(
                f"{type(self._root).__name__} is given both branches of guidance in one batch, of which the scope "
                "Guidance runs one half at times; combine it with caches of single modules, of a UNet's inside or of "
                "the output, not of blocks"
            )

    def _keep(self, unconditional: Tensor, conditional: Tensor, state: StepState) -> None:
        """Keeps the difference in float32; a number where none is needed."""
        if self._scope.copies:
            self._engine.leave_value(self._unit, conditional.new_zeros(()))
            return
        if conditional.ndim < 4:
            raise ValueError(
                f"{type(self._root).__name__} gives {list(conditional.shape)}, without height and width as last axes, "
                "so frequencies cannot be told apart; leave Guidance out, or take copies=True"
            )
        self._growth[state.branch] = _Growth(unit=1.0 if self._number(state) > 1 else 1 / TIMESTEPS)
        self._engine.leave_value(self._unit, unconditional.float() - conditional.float())

    def _unconditional(self, conditional: Tensor, kept: Tensor, state: StepState) -> Tensor:
        if self._scope.copies:
            return conditional
        growth, scope = self._growth[state.branch], self._scope
        timestep = self._number(state) / growth.unit
        growth.low *= scope.low if scope.low_window[0] < timestep < scope.low_window[1] else 1.0
        growth.high *= scope.high if scope.high_window[0] < timestep < scope.high_window[1] else 1.0
        change = scale_frequencies(kept, growth.low, growth.high)
        return (conditional.float() + change).to(conditional.dtype)

    def _number(self, state: StepState) -> float:
        """The timestep, as the scheduler lists it or as the model is told."""
        listed = self._engine.clock.level(state.step).timestep
        return float(torch.as_tensor(state.timestep).max()) if listed is None else listed


def _main(output: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def _with_main(output: Any, main: Tensor) -> Any:
    """An output of the same form with another main tensor."""
    leaves, spec = pytree.tree_flatten(output)
    place = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    return pytree.tree_unflatten([*leaves[:place], main, *leaves[place + 1 :]], spec)
