"""Defects found in other caches, planted into our engine: with each of them a check has to fail.

Where another cache shows its defect on our pipelines by itself, it is run instead (:mod:`.peers`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.acceleration import Acceleration
from dit_accel.caching.engine import CacheEngine
from dit_accel.caching.engine.track import Track
from dit_accel.caching.limits import Limits
from dit_accel.caching.predictors.base import Kept, Place
from dit_accel.caching.predictors.taylor import Taylor
from dit_accel.caching.record import CacheRecord
from dit_accel.clock import StepClock, StepState

Defect = Callable[[pytest.MonkeyPatch], None]


def branch_by_parity(patch: pytest.MonkeyPatch) -> None:
    """The branch is the parity of the calls so far (TeaCache, ParaAttention, cache-dit), whatever guidance does."""
    count = itertools.count()
    _rename_branches(patch, lambda _: f"parity {next(count) % 2}")
    _trust(patch, every_generation=True)


def one_state_for_all_branches(patch: pytest.MonkeyPatch) -> None:
    """What is kept does not know branches (diffusers' PAB; MagCache where a pipeline names no context)."""
    _rename_branches(patch, lambda _: "all")
    _trust(patch, every_generation=True)


def nothing_is_reset(patch: pytest.MonkeyPatch) -> None:
    """What is kept outlives the generation (ProfilingDiT; cache-dit whose calls are half as many as it counts on)."""
    _trust(patch, every_generation=False)
    patch.setattr(Acceleration, "_end", lambda self: None)


def warmup_is_skipped(patch: pytest.MonkeyPatch) -> None:
    """Limits do not hold (cache-dit's second generation begins inside of the first one)."""
    patch.setattr(Limits, "reason", lambda *_, **__: None)


def hooks_stay(patch: pytest.MonkeyPatch) -> None:
    """Removal forgets what was put on blocks."""
    patch.setattr(Acceleration, "remove", lambda self: None)


def hooks_are_not_reached(patch: pytest.MonkeyPatch) -> None:
    """Hooks are there and no call goes through them (diffusers' TaylorSeer on Wan, whose patterns match no module)."""
    patch.setattr(CacheEngine, "around_root", lambda self, run, arguments, latents: run())


def values_are_not_told(patch: pytest.MonkeyPatch) -> None:
    """Nobody learns what thresholds are compared with, so that they never act or all at once (TeaCache, DBCache)."""
    stock = CacheRecord.append
    patch.setattr(CacheRecord, "append", lambda self, decision: stock(self, replace(decision, value=None)))


class CountedGaps(Taylor):
    """Extrapolates as if computed steps were neighbors, whatever lies between them (FoCa's anchors)."""

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """As there, with places that are one step apart."""
        latest = kept[0].place.step
        counted = [replace(each, place=Place(latest - age, None)) for age, each in enumerate(kept)]
        return super().predict(counted, place, probe)


def wrapping_psnr(a: Tensor, b: Tensor) -> float:
    """PSNR whose differences and squares are those of 8-bit numbers, modulo 256 (cache-dit's default)."""
    x, y = ((255 * each).round().to(torch.uint8) for each in (a, b))
    difference = x - y
    error = float((difference * difference).double().mean())
    return float("inf") if error == 0 else float(10 * torch.log10(torch.tensor(255.0**2 / error)))


def _rename_branches(patch: pytest.MonkeyPatch, name: Callable[[StepState], str]) -> None:
    stock = StepClock.tick

    def tick(self: StepClock, *arguments: Any, **more: Any) -> StepState:
        state = stock(self, *arguments, **more)
        self.state = replace(state, branch=name(state))
        return self.state

    patch.setattr(StepClock, "tick", tick)


def _trust(patch: pytest.MonkeyPatch, every_generation: bool) -> None:
    """Takes away what would save the engine: prompts, shapes and steps left out are not looked at."""

    def break_reason(self: Track, state: StepState, *_: Any) -> str | None:
        return "first" if every_generation and state.generation != self.generation else None

    patch.setattr(Track, "break_reason", break_reason)
    if not every_generation:
        patch.setattr(CacheEngine, "_drop_past", lambda *_: None)
        patch.setattr(CacheEngine, "_forget", lambda *_: None)
