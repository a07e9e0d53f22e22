"""Which caches are worth a real run: ladders from nearly dense to very fast, found by replays alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..caching.policies.snr import SnrGap
from ..caching.presets.snr_gap import PACE
from ..noise import Level
from .errors import StepErrors
from .replay import Replay, replay, schedule_errors
from .search import Cost, History, Rules, best_schedules, bisect_threshold
from .spec import CacheSpec
from .trace import Trace

MAX_GAP = 7  # steps from one computed step to the next, at most; longer gaps are beyond what traces predict
KINDS = ("listed steps", "EasyCache", "steps by noise", "whole, reuse", "whole, line over steps")
"""What there is to try. Kinds of scope ``Whole`` are judged by real runs alone: traces hold no residuals."""
_BY_NOISE = (1.0, 1.2, 1.4, 1.7, 1.9, 2.2, 2.6, 3.0, 3.6, 4.2)  # thresholds of SnrGap
_LINES = 3.0  # below which lines are drawn between its steps
_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2, 0.16)  # computed steps, for dynamic policies


@dataclass(frozen=True)
class Rung:
    """One cache on a ladder.

    Attributes:
        spec: the cache.
        share: of the steps that it computes, on the traces.
        predicted: error of the final latents relative to them, predicted for the worst prompt.
    """

    spec: CacheSpec
    share: float
    predicted: float


@dataclass(frozen=True)
class Ladder:
    """Caches of one kind, from the most exact to the fastest.

    Attributes:
        name: of the kind.
        rungs: by falling share.
    """

    name: str
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Variant:
    """A way to stand in for the output, and its errors along every trace.

    Attributes:
        scope: of the caches, ``"output"`` or ``"output - latents"``.
        predictor: of them, by its name in a :class:`CacheSpec`.
        errors: of its predictions, one for each trace.
    """

    scope: str
    predictor: str
    errors: tuple[StepErrors, ...]

    @property
    def depth(self) -> int:
        """How many computed steps it looks at."""
        return self.errors[0].predictor.depth


class Prospects:
    """Predicts what caches would do, from traces of dense runs.

    Args:
        traces: one for each prompt, all of the same steps.
        max_gap: steps from one computed step to the next, at most.
        dense_steps: first steps that are computed in any case, since sparse attention beside the cache is dense there.

    Attributes:
        weights: how much an error at each step weighs in the final latents; 1 until they are fitted.

    Raises:
        ValueError: if traces differ in steps or experts.
    """

    def __init__(self, traces: Sequence[Trace], max_gap: int = MAX_GAP, dense_steps: int = 0) -> None:
        if not traces or len({(trace.steps, trace.fresh) for trace in traces}) != 1:
            raise ValueError("traces of one schedule are needed, at least one; they differ in steps or experts")
        self.traces, self.steps = tuple(traces), traces[0].steps
        forced = frozenset(range(min(dense_steps, self.steps)))
        self.rules = Rules(self.steps, 1, min(max_gap, self.steps), forced, traces[0].fresh)
        self.weights: tuple[float, ...] = (1.0,) * self.steps
        self.variants = tuple(self._variants())

    def relative_errors(self, spec: CacheSpec, number: int) -> tuple[float, ...]:
        """For every step the error of its prediction over the size of the final latents, on one trace.

        Args:
            spec: a cache of listed steps; scope ``"whole"`` is taken for the output itself.
            number: of the trace.
        """
        assert spec.computed is not None
        errors = self._variant_of(spec).errors[number]
        size = self.traces[number].extent or 1.0
        return tuple(error / size for error in schedule_errors(spec.computed, self.traces[number], errors))

    def predicted(self, errors: Sequence[float]) -> float:
        """The error of the final latents that errors of steps add up to."""
        return sum(weight * error for weight, error in zip(self.weights, errors, strict=True))

    def probes(self, shares: Sequence[float] = (0.75, 0.5, 0.36, 0.26)) -> list[CacheSpec]:
        """A few caches of very different speed, whose real runs tell the weights."""
        rungs = self.static().rungs
        return list(dict.fromkeys(min(rungs, key=lambda rung, s=share: abs(rung.share - s)).spec for share in shares))  # type: ignore[misc]

    def ladders(self, kinds: Sequence[str] = KINDS) -> list[Ladder]:
        """All that are worth a try, in the order of :data:`KINDS`.

        Args:
            kinds: those that are wanted.
        """
        static = self.static()
        found = [static] if static.name in kinds else []
        if "EasyCache" in kinds:
            found.append(self.dynamic(self._best_variant(static)))
        if "steps by noise" in kinds:
            found.append(self.by_noise())
        for kind in kinds:
            scope, _, predictor = kind.partition(", ")
            if scope == "whole":  # what blocks add follows the output they make, so the same steps matter
                likewise = [each for each in self.variants if (each.scope, each.predictor) == ("output", predictor)]
                rungs = self.static(likewise).rungs
                specs = [CacheSpec(self.steps, scope, predictor, rung.spec.computed) for rung in rungs]
                rungs = tuple(replace(rung, spec=spec) for rung, spec in zip(rungs, specs, strict=True))
                found.append(Ladder(kind, rungs))
        return [ladder for ladder in found if ladder.rungs]

    def static(self, variants: Sequence[Variant] | None = None) -> Ladder:
        """For every number of computed steps the best schedule of the best way to stand in.

        Args:
            variants: ways to stand in; all by default.
        """
        best: dict[int, Rung] = {}
        for variant in variants or self.variants:
            rules = replace(self.rules, depth=variant.depth)
            for count, schedule in best_schedules(self._cost(variant), rules).items():
                spec = CacheSpec(self.steps, variant.scope, variant.predictor, schedule.computed)
                if count < self.steps and (count not in best or schedule.cost < best[count].predicted):
                    best[count] = Rung(spec, count / self.steps, schedule.cost)
        return Ladder("listed steps", tuple(best[count] for count in sorted(best, reverse=True)))

    def dynamic(self, variant: Variant) -> Ladder:
        """Thresholds of EasyCache's rule at which decisions change, one for each of some shares of computed steps."""
        warmup = max(2, math.ceil(0.1 * self.steps), len(self.rules.forced))
        known: dict[float, _Together] = {}  # searches for different shares begin alike

        def at(threshold: float) -> _Together:
            if threshold not in known:
                spec = CacheSpec(
                    self.steps, variant.scope, variant.predictor, None, threshold, warmup=warmup, cooldown=1
                )
                pairs = zip(self.traces, variant.errors, strict=True)
                known[threshold] = _Together(
                    spec, tuple(replay(trace, spec.cache(), errors) for trace, errors in pairs)
                )
            return known[threshold]

        found: dict[tuple[tuple[bool, ...], ...], Rung] = {}
        for share in _SHARES:
            together = bisect_threshold(at, lambda each, least=share: each.share >= least).found  # type: ignore[misc]
            if together.share < 1:
                found[tuple(each.computed for each in together.replays)] = self._rung(together)
        return Ladder("EasyCache", tuple(sorted(found.values(), key=lambda rung: -rung.share)))

    def by_noise(self) -> Ladder:
        """Steps of the preset ``snr_gap`` at some thresholds; none without noise levels."""
        calls = [self.traces[0].at_step(step)[0] for step in range(self.steps)]
        levels = [Level(call.timestep, call.sigma, call.flow) for call in calls if call.sigma is not None]
        found: dict[int, Rung] = {}
        for threshold in _BY_NOISE if len(levels) == self.steps else ():
            computed = SnrGap(threshold, PACE).computed_steps(levels)
            steps = tuple(sorted({*computed, *self.rules.forced, *self.rules.fresh}))
            predictor = "settled line over steps" if threshold < _LINES else "reuse"
            spec = CacheSpec(self.steps, "output", predictor, steps)
            if len(steps) < self.steps:
                errors = [self.predicted(self.relative_errors(spec, number)) for number in range(len(self.traces))]
                found.setdefault(len(steps), Rung(spec, len(steps) / self.steps, max(errors)))
        return Ladder("steps by noise", tuple(found[count] for count in sorted(found, reverse=True)))

    def _rung(self, together: _Together) -> Rung:
        predicted = max(
            self.predicted([error / (trace.extent or 1.0) for error in each.errors])
            for trace, each in zip(self.traces, together.replays, strict=True)
        )
        return Rung(together.spec, together.share, predicted)

    def _variants(self) -> list[Variant]:
        has_noise = all(call.sigma is not None for trace in self.traces for call in trace.calls)
        predictors = ["reuse", "line over steps", "settled line over steps"]
        predictors += ["line over noise"] if has_noise else []
        found = []
        for scope in ("output", "output - latents"):
            for predictor in predictors:
                spec = CacheSpec(self.steps, scope, predictor, (0,))
                errors = tuple(StepErrors(trace, spec.predict(), spec.residual) for trace in self.traces)
                found.append(Variant(scope, predictor, errors))
        return found

    def _variant_of(self, spec: CacheSpec) -> Variant:
        scope = "output" if spec.scope == "whole" else spec.scope
        return next(each for each in self.variants if (each.scope, each.predictor) == (scope, spec.predictor))

    def _best_variant(self, static: Ladder) -> Variant:
        """The way to stand in that is best where half of the steps are computed."""
        rung = min(static.rungs, key=lambda each: abs(each.share - 0.5), default=None)
        return self.variants[0] if rung is None else self._variant_of(rung.spec)

    def _cost(self, variant: Variant) -> Cost:
        sizes = [trace.extent or 1.0 for trace in self.traces]

        def cost(history: History, step: int) -> float:
            worst = max(errors(history, step) / size for errors, size in zip(variant.errors, sizes, strict=True))
            return self.weights[step] * worst

        return cost


@dataclass(frozen=True)
class _Together:
    """One policy along all traces."""

    spec: CacheSpec
    replays: tuple[Replay, ...]

    @property
    def share(self) -> float:
        """Mean share of computed steps."""
        return sum(each.share for each in self.replays) / len(self.replays)

    @property
    def distances(self) -> tuple[float, ...]:
        """Of all traces."""
        return tuple(distance for each in self.replays for distance in each.distances)
