"""Asks the policy of a cache about calls and units, where nothing else has decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..policies.base import Moment, Sight
from .track import Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from ...clock import StepClock
    from ..policies.base import Judge
    from ..recipe import Cache
    from ..unit import Unit
    from .keeper import Keeper
    from .track import OpenCall


class Judging:
    """Verdicts of one cache.

    Args:
        cache: the recipe.
        clock: tells timesteps and noise levels.
        keeper: tells what is kept.
        units: of each expert, in the order in which they run.
    """

    def __init__(self, cache: Cache, clock: StepClock, keeper: Keeper, units: Mapping[str, tuple[Unit, ...]]) -> None:
        self._cache, self._clock, self._keeper, self._units = cache, clock, keeper, units

    def of_call(self, call: OpenCall, unit: Unit) -> Verdict:
        """For all units of a call together, when the first of them is entered."""
        if call.forced is not None:
            return Verdict(True, call.forced)
        if not self._keeper.has(call):
            return Verdict(True, "first")
        if call.leader is not None:
            led = call.leader.verdict
            return Verdict(True, "shared") if led is None else Verdict(led.computes, "shared", audits=led.audits)
        judge = self._judge(call, None, unit)
        wants = judge.wants_compute(self._sight(call, unit, call.signal))
        return self._audited(call, Verdict(wants, "policy", judge.value, judge.threshold))

    def of_unit(self, call: OpenCall, unit: Unit, entered: Tensor | None) -> Verdict:
        """For one unit, by its own judge, which sees what enters it and is told at once how it went."""
        verdict = self._unit_verdict(call, unit, entered)
        if call.leader is None:
            self._judge(call, unit.key, unit).note(self._sight(call, unit, entered), verdict.computes, None)
        return verdict

    def obstacle(self, call: OpenCall, unit: Unit, entered: Tensor | None) -> str | None:
        """Why a unit cannot be skipped although its call is reused; None if it can."""
        if not self._keeper.has_unit(call, unit):
            return "first"
        has_batch = entered is not None and (unit.is_module or unit.kind == "deep")
        if entered is not None and has_batch and 2 * self._keeper.rows(call, unit) == len(entered):
            return "shape"  # only one branch of the batch was computed
        return None if self._cache.scope.is_active(unit, call.state.step, call.state.steps) else "inactive"

    def note(self, call: OpenCall, unit: Unit, computed: bool, output: Tensor | None) -> None:
        """Tells the judge of a call how it went; followers have none."""
        if call.leader is not None or (call.verdict is not None and call.verdict.reason == "incomplete"):
            return
        if self._cache.policy.moment is Moment.CALL or call.signal is not None:
            seen = None if output is None else output.detach()
            self._judge(call, None, unit).note(self._sight(call, unit, call.signal), computed, seen)

    def _unit_verdict(self, call: OpenCall, unit: Unit, entered: Tensor | None) -> Verdict:
        reason = call.forced or self.obstacle(call, unit, entered)
        if reason is not None:
            return Verdict(True, reason)
        if call.leader is not None:
            led = call.leader.runs.get(unit.key)
            return Verdict(led is None or led.verdict.computes, "shared")
        judge = self._judge(call, unit.key, unit)
        wants = judge.wants_compute(self._sight(call, unit, entered))
        return self._audited(call, Verdict(wants, "policy", judge.value, judge.threshold))

    def _audited(self, call: OpenCall, verdict: Verdict) -> Verdict:
        """Turns an answer around where a call is audited: decided once, for all units of it that would be reused."""
        audit, track = self._cache.audit, call.track
        if verdict.computes or audit is None:
            return verdict
        if call.audits is None:
            track.unaudited += 1
            call.audits = track.unaudited >= audit.every
            track.unaudited = 0 if call.audits else track.unaudited
        return replace(verdict, computes=True, reason="audit", audits=True) if call.audits else verdict

    def _judge(self, call: OpenCall, key: str | None, unit: Unit) -> Judge:
        policy, judges, steps = self._cache.policy, call.judges, call.state.steps
        if key is None and None not in judges:
            judges[None] = policy.judge(unit, steps)
        elif key not in judges:
            units = self._units[call.state.expert]
            judges |= dict(zip([each.key for each in units], policy.judges(units, steps), strict=True))
        return judges[key]

    def _sight(self, call: OpenCall, unit: Unit, signal: Tensor | None) -> Sight:
        """Without graphs, which judges would keep alive."""
        state, tokens = call.state, call.tokens
        timestep, sigma, flow = self._clock.level(state.step)
        if timestep is None and state.timestep is not None:
            timestep = float(torch.as_tensor(state.timestep).max())
        return Sight(
            step=state.step,
            steps=state.steps,
            branch=state.branch,
            expert=state.expert,
            unit=unit,
            sigma=sigma,
            timestep=timestep,
            latents=call.latents.detach(),
            signal=None if signal is None else signal.detach(),
            computed_step=call.track.computed_step,
            tokens=None if tokens is None else tokens.detach(),
            grid=state.layout.grid,
            flow=flow,
        )
