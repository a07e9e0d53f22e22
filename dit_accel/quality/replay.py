"""What a cache would have done along a recorded run, without calling the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..caching.policies.base import Judge, Moment, Sight
from ..caching.predictors.base import Kept
from ..caching.recipe import Cache
from ..caching.scopes.output import Output
from ..caching.unit import Unit
from .errors import StepErrors, output_of, value_of
from .search import History
from .trace import Trace, TracedCall

_UNIT = Unit("output", "output")


@dataclass(frozen=True)
class Replay:
    """Decisions and errors along one trace.

    Attributes:
        computed: for every step whether it was computed.
        errors: for every step the error of its prediction, times how far the sampler goes; 0 where it was computed.
        distances: what the policy compared with its threshold where it chose to compute.
    """

    computed: tuple[bool, ...]
    errors: tuple[float, ...]
    distances: tuple[float, ...]

    @property
    def share(self) -> float:
        """Computed steps over all steps."""
        return sum(self.computed) / len(self.computed)


def replay(trace: Trace, cache: Cache, errors: StepErrors | None = None) -> Replay:
    """Lets a cache decide along a trace, with the judges that the engine would ask, in its order of reasons.

    Everything that is kept is exact (teacher-forced): a skipped step does not bend the trajectory. So decisions are
    those of the real run only as long as it stays near the dense one.

    Args:
        trace: of a dense run.
        cache: of scope ``Output``, whose policy decides before a call (``Moment.CALL``) for all branches of a step.
        errors: those of its predictor along this trace, if they are at hand.

    Raises:
        ValueError: for another cache; it can be judged by real runs only.
    """
    _check(cache)
    residual = cache.scope.residual if isinstance(cache.scope, Output) else False
    errors = errors or StepErrors(trace, cache.predictor, residual)
    follower = _Follower(trace, cache, residual)
    found = [follower.at(step) for step in range(trace.steps)]
    costs = [0.0 if history is None else errors(history, step) for step, history in enumerate(found)]
    return Replay(tuple(history is None for history in found), tuple(costs), tuple(follower.distances))


def schedule_errors(computed: tuple[int, ...], trace: Trace, errors: StepErrors) -> tuple[float, ...]:
    """For every step the error of its prediction under a list of computed steps; 0 where it is computed."""
    history: History = ()
    found = []
    for step in range(trace.steps):
        if step in trace.fresh:
            history = ()
        if step in computed or not history:
            history = (step, *history)
            found.append(0.0)
        else:
            found.append(errors(history, step))
    return tuple(found)


def _check(cache: Cache) -> None:
    if not isinstance(cache.scope, Output):
        raise ValueError(
            f"a trace holds outputs of the model, not residuals of its blocks; {type(cache.scope).__name__} can only "
            "be judged by real runs"
        )
    if cache.policy.moment is not Moment.CALL:
        raise ValueError(
            f"{type(cache.policy).__name__} decides inside of the model; a trace has only what enters and leaves it"
        )
    if cache.decide != "first" or cache.branches is not None or cache.audit is not None:
        raise ValueError('a replay needs decide="first", all branches and no audit')


class _Follower:
    """State of one replay: the engine's, without its tensors of blocks."""

    def __init__(self, trace: Trace, cache: Cache, residual: bool) -> None:
        self._trace, self._cache, self._residual = trace, cache, residual
        self._judge: Judge | None = None
        self._history: History = ()
        self._leader: dict[int, TracedCall] = {}  # first call of each step, by step
        self._consecutive = self._total = 0
        self.distances: list[float] = []

    def at(self, step: int) -> History | None:
        """The computed steps that a step is predicted from, newest first; None if it is computed."""
        call = self._leader[step] = self._trace.at_step(step)[0]
        if self._judge is None or step in self._trace.fresh:
            self._judge = self._cache.policy.judge(_UNIT, self._trace.steps)
            self._history, self._consecutive, self._total = (), 0, 0
        sight, history = self._sight(call), self._history
        computes = self._computes(step, sight)
        output = call.output.float() if computes else self._predicted(call)
        self._judge.note(sight, computes, output)
        if computes:
            self._history, self._consecutive = (step, *self._history), 0
            return None
        self._consecutive, self._total = self._consecutive + 1, self._total + 1
        return history

    def _computes(self, step: int, sight: Sight) -> bool:
        assert self._judge is not None
        limits = self._cache.limits
        if not self._history or limits.reason(step, self._trace.steps, self._consecutive, self._total) is not None:
            return True
        computes = self._judge.wants_compute(sight)
        if computes and self._judge.value is not None:
            self.distances.append(self._judge.value)
        return computes

    def _predicted(self, call: TracedCall) -> torch.Tensor:
        kept = [
            Kept(self._leader[at].place(self._trace.steps), value_of(self._leader[at], self._residual))
            for at in self._history[: self._cache.predictor.depth]
        ]
        value = self._cache.predictor.predict(kept, call.place(self._trace.steps))
        return output_of(value, call, self._residual)

    def _sight(self, call: TracedCall) -> Sight:
        return Sight(
            step=call.step,
            steps=self._trace.steps,
            branch=call.branch,
            expert=call.expert,
            unit=_UNIT,
            sigma=call.sigma,
            timestep=call.timestep,
            latents=call.latents.float(),
            signal=None,
            computed_step=self._history[0] if self._history else None,
            grid=self._trace.grid,
            flow=call.flow,
        )
