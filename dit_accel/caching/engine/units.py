"""What one cache does with the units within a call: asks the policy, stands in for them or keeps their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor
from torch.utils import _pytree as pytree

from ...timing import spent
from ..policies.base import Moment
from ..record import CacheRecord, Decision
from ..unit import Unit
from .judging import Judging
from .keeper import Keeper, Streams
from .rows import second_half
from .track import OpenCall, UnitRun, Verdict

if TYPE_CHECKING:
    from ...clock import StepClock
    from ...timing import Timer
    from ..recipe import Cache

Run = Callable[[], Any]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _timed(method: _Method) -> _Method:
    """Counts the time of a method as work of the cache; none of them calls another, or the model."""

    @functools.wraps(method)
    def timed(self: UnitSeams, *args: Any, **kwargs: Any) -> Any:
        with spent(self.timer, "cache"):
            return method(self, *args, **kwargs)

    return cast(_Method, timed)


class UnitSeams:
    """What the seams on a model tell a cache; does nothing while no call of the root is open.

    Args:
        cache: the recipe.
        clock: of the pipeline.
        timer: takes the time that the cache itself needs; None for none.

    Attributes:
        record: what was decided, for the report.
    """

    def __init__(self, cache: Cache, clock: StepClock, timer: Timer | None = None) -> None:
        self.cache, self.clock, self.timer = cache, clock, timer
        self.record = CacheRecord(cache.name or "cache", repr(cache))
        self.keeper = Keeper(cache, clock, self.record)
        self.units: dict[str, tuple[Unit, ...]] = {}  # by expert
        self._judging = Judging(cache, clock, self.keeper, self.units)
        self._call: OpenCall | None = None  # that runs now

    def declare(self, expert: str, units: tuple[Unit, ...], shares: Mapping[str, float | None]) -> None:
        """Says which units an expert has, and what share of its blocks each is, None where blocks do not tell."""
        self.units[expert] = units
        self.keeper.unit_counts[expert] = len(units)
        self.record.declare(expert, shares)

    @property
    def is_open(self) -> bool:
        """Whether a call of the root is running that this cache acts on."""
        return self._call is not None

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the call that is running, bound by name."""
        return {} if self._call is None else self._call.arguments

    @property
    def latents(self) -> Tensor:
        """The main input of the root in the call that is running."""
        assert self._call is not None
        return self._call.latents

    def _verdict(self, call: OpenCall, unit: Unit, entered: Tensor | None) -> Verdict:
        """What happens to a unit that is entered; decided now if it is not known yet."""
        if self.cache.policy.moment is Moment.UNIT:
            verdict = self._judging.of_unit(call, unit, entered)
            self._write(call, unit.key, verdict)
            return verdict
        if call.verdict is None:
            call.verdict = self._judging.of_call(call, unit)
        if call.verdict.computes and not call.verdict.audits:
            return call.verdict
        obstacle = self._judging.obstacle(call, unit, entered)
        if obstacle is None:
            return call.verdict
        verdict = Verdict(True, obstacle)
        self._write(call, unit.key, verdict)
        return verdict

    def _start(self, call: OpenCall, unit: Unit, entered: Streams, main: Tensor | None) -> UnitRun:
        is_repeated = unit.key in call.runs
        if is_repeated:  # chunks of one batch, say: one value cannot stand in for all of them
            self.keeper.drop_unit(call, unit)
        verdict = Verdict(True, "repeated") if is_repeated else self._verdict(call, unit, main)
        run = call.runs[unit.key] = UnitRun(unit, verdict, entered, is_repeated=is_repeated)
        return run

    def _audit(self, call: OpenCall, predicted: Any, computed: Any) -> None:
        """Takes note of how wrong a prediction would have been, and tightens the policy if it was too wrong."""
        guess, value = main_tensor(predicted), main_tensor(computed)
        if guess is None or value is None or not self._wants_audit(call) or self.cache.audit is None:
            return
        call.audited = True
        error = float((guess.float() - value.float()).abs().mean() / value.float().abs().mean())
        too_wrong = not error <= self.cache.audit.limit  # NaN is too wrong
        if too_wrong and not (call.leader or call).tightened:  # once for all branches of a step
            (call.leader or call).tightened = True
            for judge in call.judges.values():
                judge.tighten(self.cache.audit.factor)
        self.record.add_audit(call.state, error, too_wrong)

    def _wants_audit(self, call: OpenCall) -> bool:
        """The first unit of a call speaks for all that share its verdict: each comparison waits for the device."""
        return not call.audited or self.cache.policy.moment is Moment.UNIT

    def _write(self, call: OpenCall, unit: str | None, verdict: Verdict) -> None:
        where = (call.state.generation, call.state.step, call.state.branch, call.state.expert)
        name = self.cache.name or "cache"
        told = (verdict.computes, verdict.reason, verdict.value, verdict.threshold)
        self.record.append(Decision(*where, name, unit, *told))

    # ---- the whole output as a unit ----------------------------------------------------------------------------

    def _run_root(self, call: OpenCall, run: Run) -> Any:
        unit, residual = self.units[call.state.expert][0], getattr(self.cache.scope, "residual", False)
        if unit.kind != "output":
            return run()
        verdict = self._start(call, unit, (), call.latents).verdict
        call.done.add(unit.key)
        if not verdict.computes:
            return self.keeper.predicted_output(call, unit, residual)
        predicted = self.keeper.predicted_output(call, unit, residual) if verdict.audits else None
        output = run()
        self.keeper.keep_output(call, unit, output, residual)
        self._audit(call, predicted, output)
        return output

    # ---- blocks as units ---------------------------------------------------------------------------------------

    @_timed
    def at_first_block(self, entered: Tensor | None, modulated: Callable[[], Tensor]) -> None:
        """Told when the first block of the model is entered.

        Args:
            entered: its main stream.
            modulated: gives the modulated input, for policies at INPUT.
        """
        call = self._call
        if call is None:
            return
        if self.cache.policy.moment is Moment.INPUT and call.leader is None:
            call.signal = modulated()
        elif self.cache.policy.moment is Moment.PROBE and (call.leader is None or self.cache.predictor.needs_probe):
            call.tokens = entered

    @_timed
    def at_probe_end(self, entered: Tensor | None) -> None:
        """Told when the block behind the probe is entered, with its main stream."""
        call = self._call
        if call is not None and call.tokens is not None and entered is not None:
            call.signal = call.probe = entered.detach() - call.tokens.detach()

    @_timed
    def enter(self, unit: Unit, entered: Streams, main: Tensor | None) -> None:
        """Told when the first block of a unit is entered.

        Args:
            unit: which.
            entered: all of its streams.
            main: that of the video or image tokens.
        """
        call = self._call
        if call is None:
            return
        run = self._start(call, unit, entered, main)
        if not run.verdict.computes or run.verdict.audits:
            run.predicted = self.keeper.predict(call, unit)

    def is_skipping(self, unit: Unit) -> bool:
        """Whether a unit that was entered is skipped in this call."""
        run = self._call.runs.get(unit.key) if self._call is not None else None
        return run is not None and not run.verdict.computes

    @_timed
    def stand_in(self, unit: Unit) -> Streams:
        """What leaves a unit that is skipped: what entered it, and the residual that is predicted."""
        assert self._call is not None
        run = self._call.runs[unit.key]
        assert run.predicted is not None
        self._call.done.add(unit.key)
        left = tuple(_add(part, change) for part, change in zip(run.entered, run.predicted, strict=True))
        run.entered, run.predicted = (), None
        return left

    @_timed
    def leave(self, unit: Unit, left: Streams, main: int = 0) -> None:
        """Told what left a unit that was computed.

        Args:
            unit: which.
            left: all of its streams.
            main: which of them is that of the video or image tokens, the one that audits look at.
        """
        call = self._call
        run = call.runs.get(unit.key) if call is not None else None
        if call is None or run is None:
            return
        call.done.add(unit.key)
        values = tuple(_minus(after, before) for after, before in zip(left, run.entered, strict=True))
        if not run.is_repeated:
            self.keeper.keep(call, unit, values)
        if run.predicted is not None:
            self._audit(call, run.predicted[main], values[main])
        run.entered, run.predicted = (), None

    # ---- outputs as units: single modules, the inside of a UNet, the unconditional branch of guidance --------------

    def around_module(self, unit: Unit, run: Run, entered: Tensor | None) -> Any:
        """One call of a module whose output is kept: any nest of tuples, lists, mappings and tensors.

        Args:
            unit: which.
            run: computes it.
            entered: its main input, for policies that look at it.
        """
        stand_in = self.enter_value(unit, entered)
        if stand_in is not None:
            return stand_in
        output = run()
        self.leave_value(unit, output)
        return output

    @_timed
    def enter_value(self, unit: Unit, entered: Tensor | None) -> Any | None:
        """Told when something is entered whose output is kept.

        Args:
            unit: which.
            entered: its main input.

        Returns:
            what stands in for it; None if it is to be computed, and :meth:`leave_value` to be told.
        """
        call = self._call
        if call is None:
            return None
        run = self._start(call, unit, (), entered)
        call.done.add(unit.key)
        if not run.verdict.computes:
            return _of_rows(self.keeper.predicted_tree(call, unit), entered)
        if run.verdict.audits and self._wants_audit(call):
            run.predicted = _of_rows(self.keeper.predict(call, unit), entered)
        return None

    @_timed
    def leave_value(self, unit: Unit, value: Any) -> None:
        """Told what it gave when it was computed; keeps a copy."""
        call = self._call
        if call is None:
            return
        run = call.runs[unit.key]
        if not run.is_repeated:
            self.keeper.keep_tree(call, unit, value)
        self._audit(call, run.predicted, value)
        run.predicted = None


def _of_rows(tree: Any, entered: Tensor | None) -> Any:
    """What was predicted for a batch, cut to its conditional branch where only that is run."""
    return tree if entered is None else second_half(tree, 2 * len(entered))


def main_tensor(output: Any) -> Tensor | None:
    """The first tensor in any nest of lists, tuples and mappings; None if there is none."""
    return next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)


def _add(part: Tensor | None, change: Tensor | None) -> Tensor | None:
    return part if part is None or change is None else part + change


def _minus(after: Tensor | None, before: Tensor | None) -> Tensor | None:
    return None if after is None or before is None else after - before
