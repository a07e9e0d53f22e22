"""Runs one cache on the models of a pipeline: opens and closes each call, and tells what was kept for how long.

The order in which a call is decided: what was kept does not fit (first call, other shape, other prompt, a step left
out); then the limits; then the branch that leads this step, if branches decide together; then the policy, at its
moment.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...timing import spent
from ..policies.base import Moment
from ..record import Decision
from .identity import Fingerprint
from .track import OpenCall, Track, Verdict, shape_of
from .units import Run, UnitSeams, main_tensor

if TYPE_CHECKING:
    from ...clock import StepClock, StepState
    from ...timing import Timer
    from ..recipe import Cache

_PROMPTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
    "encoder_hidden_states_image",
    "added_cond_kwargs",
    "class_labels",
)


class CacheEngine(UnitSeams):
    """One cache at work on all experts of a pipeline.

    Args:
        cache: the recipe.
        clock: of the pipeline.
        timer: takes the time that the cache itself needs; None for none.

    Attributes:
        warmup: first steps of the whole schedule that are computed, besides those of the recipe's limits; the
            acceleration sets it, so that cache and sparse attention warm up together.
        others: the other caches of the same acceleration.
    """

    def __init__(self, cache: Cache, clock: StepClock, timer: Timer | None = None) -> None:
        super().__init__(cache, clock, timer)
        self.others: tuple[CacheEngine, ...] = ()
        self.warmup = 0
        self._tracks: dict[tuple[str, str], Track] = {}  # by expert and branch
        self._leading: dict[str, OpenCall] = {}  # by expert: the call that decided the latest step
        self._latest: StepState | None = None
        # Of the generation, not of one expert: both warm up once, and share what may be reused in all.
        self._first_step = 0
        self._reused: Counter[str] = Counter()  # steps by branch
        self._ended: OpenCall | None = None  # that ran last
        self._is_busy = False  # whether a call is running

    def check_idle(self) -> None:
        """Refuses a second call while one is running, whose blocks could not be told from those of the first.

        Raises:
            RuntimeError: saying what to do.
        """
        if self._is_busy:
            raise RuntimeError(
                "a model with a cache runs one call at a time, and another thread is calling it; give each thread a "
                "model of its own (pipelines made by from_pipe share one), or let them take turns by generations"
            )

    def around_root(self, run: Run, arguments: dict[str, Any], latents: Tensor) -> Any:
        """One call of the root, from opening to closing.

        Args:
            run: computes it.
            arguments: bound by name.
            latents: the main input among them.

        Raises:
            RuntimeError: as :meth:`check_idle`.
        """
        self.check_idle()
        self._is_busy = True
        try:
            return self._around_root(run, arguments, latents)
        finally:
            self._is_busy = False

    def _around_root(self, run: Run, arguments: dict[str, Any], latents: Tensor) -> Any:
        state = self.clock.state
        self._ended = None
        if state is None:
            return run()
        self._drop_past(state)
        if not self._acts_on(state):
            where = (state.generation, state.step, state.branch, state.expert)
            self.record.append(Decision(*where, self.cache.name or "cache", None, True, "branch"))
            return run()
        with spent(self.timer, "cache"):
            call = self._call = self._open(state, arguments, latents)
        try:
            output = self._run_root(call, run)
            if not call.is_whole:
                output = self._run_again(call, run)
            with spent(self.timer, "cache"):
                self._close(call, output)
        except BaseException:
            self._forget(state.expert, state.branch)  # whatever was kept may be half of something
            raise
        finally:
            call.release()
            self._call, self._ended = None, call
        return output

    def skipped(self, expert: str, block: int | None, path: str) -> bool:
        """Whether the call that has just ended skipped a block of an expert, or the module at a path within it."""
        call = self._ended
        return call is not None and call.state.expert == expert and call.skipped(block, path)

    def warms_up(self, state: StepState) -> bool:
        """Whether the recipe's own warm-up lasts at a call that is about to be opened."""
        is_new = self._latest is None or self._latest.generation != state.generation
        first = state.step if is_new else self._first_step
        steps = None if state.steps is None else state.steps - first
        return state.step - first < self.cache.limits.warmup_steps(steps)

    def consecutive(self, state: StepState) -> int:
        """How many calls in a row the branch of a call that is about to be opened has reused until now."""
        track = self._tracks.get((state.expert, state.branch))
        return 0 if track is None or track.generation != state.generation else track.consecutive

    def forget(self) -> None:
        """Drops everything that was kept."""
        for expert, branch in list(self._tracks):
            self._forget(expert, branch)
        self._leading.clear()
        self.keeper.clear()

    def _acts_on(self, state: StepState) -> bool:
        return self.cache.branches is None or state.branch in self.cache.branches

    def _open(self, state: StepState, arguments: dict[str, Any], latents: Tensor) -> OpenCall:
        key, shape = (state.expert, state.branch), shape_of(latents, state)
        said = [arguments[name] for name in _PROMPTS if arguments.get(name) is not None]
        prompt = Fingerprint.of(said or None)
        track = self._tracks.get(key)
        broken = "first" if track is None else track.break_reason(state, shape, prompt)
        if track is None or broken is not None:
            self._forget(*key)
            track = self._tracks[key] = Track(state.generation, shape, prompt)
        track.prompt = prompt
        leading = self._leader_of(state)
        call = OpenCall(state, track, leading, arguments, latents, broken or self._limit(track, state))
        if leading is None:
            self._leading[state.expert] = call
        return call

    def _leader_of(self, state: StepState) -> OpenCall | None:
        """The call that has decided this step already; None if this one is to decide."""
        leading = self._leading.get(state.expert)
        if self.cache.decide == "each" or leading is None or leading.state.branch == state.branch:
            return None
        here = (leading.state.generation, leading.state.step) == (state.generation, state.step)
        return leading if here else None

    def _limit(self, track: Track, state: StepState) -> str | None:
        """Steps count from where the generation began: image-to-image runs leave the first ones out.

        Not so those that sparse attention leaves dense: they are steps of the whole schedule, in which it counts.
        """
        if state.step < self.warmup:
            return "warm-up"
        step = state.step - self._first_step
        steps = None if state.steps is None else state.steps - self._first_step
        return self.cache.limits.reason(step, steps, track.consecutive, self._reused[state.branch])

    def _drop_past(self, state: StepState) -> None:
        """Forgets the generation before, and an expert that another one has followed."""
        before, self._latest = self._latest, state
        if before is None or before.generation != state.generation:
            self._first_step = state.step
            self._reused.clear()
            self.forget()
            self.record.begin(state.generation)
        elif before.expert != state.expert and before.step != state.step:
            for expert, branch in list(self._tracks):
                if expert != state.expert:
                    self._forget(expert, branch)

    def _run_again(self, call: OpenCall, run: Run) -> Any:
        warnings.warn(
            f"dit_accel: the model left out blocks of a unit of {self.cache.name or 'the cache'}, so a step was "
            "computed after all; choose a scope without these blocks",
            stacklevel=2,
        )
        self._forget(call.state.expert, call.state.branch)
        call.start_again("incomplete")
        return run()

    def _close(self, call: OpenCall, output: Any) -> None:
        """Notes the outcome: for the judge, the limits and the report."""
        state, by_unit = call.state, self.cache.policy.moment is Moment.UNIT
        if call.verdict is None and not by_unit:  # no unit was entered, so nobody asked
            call.verdict = Verdict(True, call.forced or "not asked")
        computed = call.computed_all if by_unit else call.verdict is None or call.verdict.computes
        if not by_unit and call.verdict is not None:
            self._judging.note(call, self.units[state.expert][0], computed, main_tensor(output))
            self._write(call, None, call.verdict)
        call.track.count(state.step, computed)
        self._reused[state.branch] += not computed
        for unit in self.units[state.expert]:
            if unit.key not in call.runs:  # within something that another cache skipped: its value would be too old
                self.keeper.drop_unit(call, unit)
        self._count_judges()
        if state.steps is not None and state.step >= state.steps - 1:
            self._forget_last(state)

    def _forget_last(self, state: StepState) -> None:
        """Behind the last step: nobody will ask for this branch, nor for those that guidance left out before it."""
        for (expert, branch), track in list(self._tracks.items()):
            is_stale = track.last_step is not None and track.last_step < state.step - 1
            if is_stale or (expert, branch) == (state.expert, state.branch):
                self._forget(expert, branch)

    def _forget(self, expert: str, branch: str) -> None:
        track = self._tracks.pop((expert, branch), None)
        if track is not None:
            track.judges.clear()  # the latest calls still know the track, and judges hold tensors
            self._count_judges()
        self.keeper.drop(expert, branch)

    def _count_judges(self) -> None:
        self.keeper.count_judges(judge for track in self._tracks.values() for judge in track.judges.values())
