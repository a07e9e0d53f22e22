"""One tuning: traces, ladders of candidates, real pairs, and the verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .amplification import fit_weights
from .candidates import KINDS, Ladder, Prospects, Rung
from .climb import last_good
from .key import Key
from .margin import lower_bound, shared_coverage
from .pairs import Bench, Pair, alarms, describe_floor, records, speed_up, summary
from .profile import Profile
from .request import Margins, steps_of
from .sampling import NotFinite
from .spec import CacheSpec
from .target import Target
from .trace import Trace, recording, trace_dtype

Tell = Callable[[str], None]
_ROUNDS = 6  # how often the search is repeated with more margin where held-out prompts fail
_PROBE_PROMPTS = 2
_FAILED = "fails on held-out prompts"
_BROKEN = "fails"  # comes to NaN, or takes more memory than there is


@dataclass
class Tuner:
    """One target; see :func:`tune`.

    Attributes:
        target: what to keep.
        margins: when a cache is accepted.
        bench: runs prompts, those held out last; what it has run already is not run again.
        tuned: how many prompts are to be tuned on.
        key: of the model.
        tell: is given one line about everything that happens.
        kinds: of caches to try.
        traces: of the prompts to be tuned on; filled if it is empty.
    """

    target: Target
    margins: Margins
    bench: Bench
    tuned: int
    key: Key
    tell: Tell
    kinds: tuple[str, ...] = KINDS
    traces: list[Trace] = field(default_factory=list)
    _verdicts: dict[CacheSpec, str] = field(default_factory=dict)
    _bounds: dict[CacheSpec, float] = field(default_factory=dict)
    _notes: dict[str, str] = field(default_factory=dict)
    _shares: dict[CacheSpec, float] = field(default_factory=dict)
    _probes: set[CacheSpec] = field(default_factory=set)
    _unfinished: set[CacheSpec] = field(default_factory=set)  # whose first prompts failed, so that no other was run
    _judged: set[CacheSpec] = field(default_factory=set)  # that prompts held out were asked about
    _passed: set[CacheSpec] = field(default_factory=set)  # that kept the target on the prompts tuned on
    _dense_seconds: float = math.inf

    def __post_init__(self) -> None:
        self.sampler, self.prompts = self.bench.sampler, self.bench.prompts

    # ---- the whole course --------------------------------------------------------------------------------------

    def profile(self) -> Profile:
        """Traces, searches, verifies."""
        if not self.traces:
            self.traces += self._trace()
        trace = self.traces[0]
        self.key = self.key.of_run(trace.steps, trace.grid, trace.guidance)
        if not self.bench.floor.runs:
            self.bench.run_dense(0)
        self.tell(f"noise floor: {describe_floor(self.bench.floor)}")
        self.bench.floor.check(self.target)
        if self.target.is_time:
            self._dense_seconds = self.bench.run_dense(0).seconds
            if self._dense_seconds <= self.target.value:
                return self.off(f"dense takes {self._dense_seconds:.3g} s, which is fast enough")
        prospects = Prospects(self.traces, dense_steps=self.bench.dense_steps(trace.steps))
        nothing = f"{trace.steps} steps leave nothing to reuse"
        if not prospects.static().rungs:
            return self.off(nothing)
        offset = self._weigh(prospects)
        ladders = prospects.ladders(self.kinds)
        self._shares = {rung.spec: rung.share for ladder in ladders for rung in ladder.rungs}
        if not ladders:
            return self.off(nothing)
        self.bench.wants_fresh_times = self.target.is_time  # after the weights, which go by errors alone
        return self._within_time(ladders) if self.target.is_time else self._at_quality(ladders, offset)

    def adopt(self, spec: CacheSpec) -> Profile:
        """The profile with another cache than was found: one that keeps a stricter target and is faster still."""
        self._verdicts |= {each: "slower" for each, verdict in self._verdicts.items() if verdict == "chosen"}
        self.tell(f"{spec.describe()} keeps a stricter target, and is faster")
        return self._finish(spec)

    def off(self, reason: str) -> Profile:
        """A profile that says to run dense."""
        self.tell(f"off: {reason}")
        return self._made(None, reason, ())

    # ---- traces ------------------------------------------------------------------------------------------------

    def _trace(self) -> list[Trace]:
        traces: list[Trace] = []
        for number in range(self.tuned):
            dtype = trace_dtype(traces[0].bytes if traces else 0, self.tuned)
            with recording(self.sampler.pipe, dtype) as recorder:
                generation = self.bench.run_dense(number)
            traces.append(recorder.trace(generation.latents))
            size = traces[-1].bytes / 2**20
            self.tell(f"traced {number + 1}/{self.tuned} ({generation.seconds:.3g} s, {size:.3g} MiB): "
                      f"{self.prompts[number]}")  # fmt: skip
        return traces

    def _weigh(self, prospects: Prospects) -> float:
        """Fits the weights of the steps from a few real runs.

        Returns:
            what is to be added to ``-20 log10`` of a predicted error to guess its score.
        """
        errors, finals, scores = [], [], []
        probes = prospects.probes()
        self._probes.update(probes)
        for spec in probes:
            for number in range(min(_PROBE_PROMPTS, self.tuned)):
                pair = self._attempt(spec, number)
                if pair is None:
                    break
                errors.append(prospects.relative_errors(spec, number))
                finals.append(pair.rel_error)
                scores.append(pair.score(self.target))
        if not errors:
            return 0.0
        try:
            prospects.weights = tuple(fit_weights(np.array(errors), np.array(finals)).tolist())
        except ValueError:  # every probe is bit-equal to dense, so any weights will do
            return 0.0
        guessed = [_decibels(prospects.predicted(row)) for row in errors]
        first, last = prospects.weights[0], prospects.weights[-1]
        self.tell(f"an error at the first step weighs {first:.3g} in the final latents, one at the last {last:.3g}")
        return statistics.median(score - guess for score, guess in zip(scores, guessed, strict=True))

    # ---- a quality ---------------------------------------------------------------------------------------------

    def _at_quality(self, ladders: Sequence[Ladder], offset: float) -> Profile:
        """Searches, and asks the held-out prompts; where they fail, again with more margin, for what is faster.

        If nothing has that margin, what keeps the target without it is asked as well: it may do for those prompts.
        """
        extra, last = 0.0, "no cache keeps the target"
        best: Rung | None = None
        for _ in range(_ROUNDS):
            accepted = self._search(ladders, offset, extra) or self._promising(extra)
            accepted = [rung for rung in accepted if self._is_faster(rung, best)]
            shorts = []
            for rung in accepted:  # one hard prompt may be hard for the fastest alone
                short = self._shortfall(rung)
                if short <= 0:
                    best = rung
                    break
                shorts.append(short)
            if not shorts:
                if best is not None or not extra:
                    break
                extra = 0.0
                continue
            if math.isinf(min(shorts)):
                last = "what keeps the target on the prompts tuned on fails on those held out"
                continue
            last = f"what keeps the target on the prompts tuned on misses it by {min(shorts):.2f} dB on those held out"
            extra = max(extra, min(shorts))
        if best is not None:
            return self._finish(best.spec)
        return self.off(f"{last}; the nearest: {self._nearest()}" if self._bounds else last)

    def _is_faster(self, rung: Rung, best: Rung | None) -> bool:
        return best is None or self._expected_time(rung) < self._expected_time(best)

    def _search(self, ladders: Sequence[Ladder], offset: float, extra: float) -> list[Rung]:
        """The fastest good rung of every ladder, the fastest of all first."""
        found: list[Rung] = []
        for ladder in ladders:
            if ladder.name in self._notes:
                continue
            fastest = min((rung.share for rung in found), default=1.0)
            count = self._untried(ladder.rungs)
            first = next((i for i, rung in enumerate(ladder.rungs[:count]) if rung.share < fastest), None)
            if first is None:
                continue
            wanted = self.target.wanted + extra
            guess = sum(_decibels(rung.predicted) + offset >= wanted + 1 for rung in ladder.rungs) - 1

            def good(at: int, ladder: Ladder = ladder) -> bool:
                return self._keeps(ladder.rungs[at], extra)

            best = self._climb(ladder, lambda: last_good(count, guess, good, first))  # noqa: B023
            if best is not None:
                found.append(ladder.rungs[best])
        return sorted(found, key=self._expected_time)

    def _keeps(self, rung: Rung, extra: float) -> bool:
        """Whether the prompts tuned on keep the target, with margin; the first one that fails ends it."""
        wanted, scores = self.target.wanted + extra, []
        for number in range(self.tuned):
            pair = self._attempt(rung.spec, number, timed=number == 0)
            if pair is None:
                return False
            scores.append(pair.score(self.target))
            if scores[-1] < wanted:
                break
        is_whole = len(scores) == self.tuned
        bound = lower_bound(scores, self.margins.coverage if is_whole and self.tuned > 1 else None)
        self._bounds[rung.spec], keeps = bound, bound >= wanted
        (self._unfinished.discard if is_whole else self._unfinished.add)(rung.spec)
        below = "below target" if bound < self.target.wanted else "too near the target"
        self._verdicts[rung.spec] = "kept" if keeps else below
        if is_whole and bound >= self.target.wanted:
            self._passed.add(rung.spec)
        expected = f"{min(scores):.2f} dB at least, {bound:.2f} dB to be expected"
        self.tell(f"{'keeps' if keeps else 'misses'} {wanted:.4g} dB ({expected}): {rung.spec.describe()}")
        return keeps

    def _shortfall(self, rung: Rung) -> float:
        """By how many decibels held-out prompts miss the target, or all prompts the margin; infinite if one fails."""
        self._judged.add(rung.spec)
        numbers = range(self.tuned, len(self.prompts))
        pairs = [self._attempt(rung.spec, number, timed=True) for number in numbers]
        held_out = [pair.score(self.target) for pair in pairs if pair is not None]
        if len(held_out) < len(pairs):
            return math.inf
        tuned = [self._run(rung.spec, number).score(self.target) for number in range(self.tuned)]
        bound = lower_bound([*tuned, *held_out], shared_coverage(self.margins.coverage, len(self._passed)))
        self._bounds[rung.spec] = bound
        short = self.target.wanted - min(min(held_out), bound)
        if short > 0:
            self._verdicts[rung.spec] = _FAILED
        self.tell(f"held out: {min(held_out):.2f} dB at least, {bound:.2f} dB to be expected: {rung.spec.describe()}")
        return short

    def _promising(self, extra: float) -> list[Rung]:
        """The fastest good one of those that were run for the weights alone, and were good: no walk came by them."""
        if KINDS[0] not in self.kinds:
            return []
        probes = [each for each in self.bench.measured() if each in self._probes and each not in self._verdicts]
        probes = [each for each in probes if self._worst(each) >= self.target.wanted + extra]
        rungs = [Rung(each, len(each.computed or ()) / each.steps, 0.0) for each in probes]
        good = (rung for rung in sorted(rungs, key=self._expected_time) if self._keeps(rung, extra))
        return [rung] if (rung := next(good, None)) is not None else []

    def _worst(self, spec: CacheSpec) -> float:
        """The lowest score of a cache so far."""
        return min(pair.score(self.target) for pair in self.bench.measured()[spec])

    def _nearest(self) -> str:
        """What came nearest to being good enough, and what it lacks; one that all prompts were run on, if any."""
        spec = max(self._bounds, key=lambda each: (each not in self._unfinished, self._bounds[each]))
        worst = f"{spec.describe()}, {self.target.said(self._worst(spec))} on its worst prompt"
        if spec in self._unfinished:
            return f"{worst}, with others left out"
        return f"{worst} and {self.target.said(self._bounds[spec])} to be expected of one more"

    # ---- a time ------------------------------------------------------------------------------------------------

    def _within_time(self, ladders: Sequence[Ladder]) -> Profile:
        last = "nothing is fast enough"
        for _ in range(_ROUNDS):
            found = [rung for ladder in ladders if (rung := self._slowest_in_time(ladder)) is not None]
            if not found:
                break
            for rung in sorted(found, key=self._worst_score, reverse=True):
                tried = [self._attempt(rung.spec, n, timed=True) for n in range(self.tuned, len(self.prompts))]
                held_out = [pair for pair in tried if pair is not None]
                seconds = statistics.median(math.inf if pair is None else pair.seconds for pair in tried)
                speed = speed_up(held_out) or 1.0
                self._judged.add(rung.spec)
                kept = len(held_out) == len(tried) and seconds <= self.target.value
                if kept and speed >= self.margins.min_speed_up:
                    return self._finish(rung.spec)
                self._verdicts[rung.spec] = _FAILED
                found_out = f"takes {seconds:.3g} s, with dense {speed:.3g} times as long, on those held out"
                last = f"what is fast enough on the prompts tuned on {found_out}"
        measured = self.bench.measured().values()
        if not measured:
            return self.off("every cache fails")
        quickest = min(statistics.median(pair.seconds for pair in pairs) for pairs in measured)
        return self.off(f"{last}; the fastest cache takes {quickest:.3g} s")

    def _slowest_in_time(self, ladder: Ladder) -> Rung | None:
        """The most exact rung of a ladder that is fast enough."""
        turned = ladder.rungs[::-1]
        count = self._untried(turned, (_FAILED,))
        if ladder.name in self._notes or not count:
            return None
        best = self._climb(ladder, lambda: self._last_in_time(turned, count))
        return None if best is None else turned[best]

    def _last_in_time(self, turned: Sequence[Rung], count: int) -> int | None:
        """The last that is fast enough of the first rungs, which get slower.

        One that fails says nothing about time: first slower ones are tried, which may well work, then faster ones.
        """
        best = last_good(count, count // 2, lambda at: self._is_fast(turned[at]) is not False)
        if best is None or self._verdicts.get(turned[best].spec) != _BROKEN:
            return best
        return last_good(best, best - 1, lambda at: self._is_fast(turned[at]) is True)

    def _is_fast(self, rung: Rung) -> bool | None:
        """Whether a call takes no longer than asked for; the median, since all prompts take the same but for noise.

        Returns:
            None for a cache that fails.
        """
        if self._verdicts.get(rung.spec) == _BROKEN:
            return None
        pairs = [pair for number in range(self.tuned) if (pair := self._attempt(rung.spec, number)) is not None]
        if len(pairs) < self.tuned:
            return None
        seconds = statistics.median(pair.seconds for pair in pairs)
        # What is fast enough and hardly faster than dense would be off, where a faster one serves.
        fast = seconds <= min(self.target.value, self._dense_seconds / self.margins.min_speed_up)
        self._verdicts[rung.spec] = "fast enough" if fast else "too slow"
        self.tell(f"takes {seconds:.3g} s: {rung.spec.describe()}")
        return fast

    def _worst_score(self, rung: Rung) -> float:
        return min(self._run(rung.spec, number).score(self.target) for number in range(self.tuned))

    # ---- both --------------------------------------------------------------------------------------------------

    def _climb(self, ladder: Ladder, walk: Callable[[], int | None]) -> int | None:
        """Walks a ladder; one that the model refuses is left out, aloud."""
        try:
            return walk()
        except ValueError as error:
            if self.bench.measured().keys() & {rung.spec for rung in ladder.rungs}:
                raise
            self._notes[ladder.name] = str(error)
            self.tell(f"left out: {ladder.name}: {error}")
            return None

    def _untried(self, rungs: Sequence[Rung], ends: Sequence[str] = (_FAILED, _BROKEN)) -> int:
        """How many come before the first with a verdict that ends a ladder; those behind it would fail too."""
        failed = (index for index, rung in enumerate(rungs) if self._verdicts.get(rung.spec) in ends)
        return next(failed, len(rungs))

    def _run(self, spec: CacheSpec, number: int, timed: bool = False) -> Pair:
        return self.bench.pair(spec, number, timed)

    def _attempt(self, spec: CacheSpec, number: int, timed: bool = False) -> Pair | None:
        """As :meth:`_run`; None, aloud, where a cache comes to NaN or takes more memory than there is."""
        try:
            return self._run(spec, number, timed)
        except (NotFinite, torch.OutOfMemoryError) as error:
            self._verdicts[spec] = _BROKEN
            self.tell(f"fails ({str(error).partition(chr(10))[0]}): {spec.describe()}")
            return None

    def _expected_time(self, rung: Rung) -> float:
        """Over that of dense: one timing is noise, so what a skipped step costs is pooled over all runs of a scope."""
        costs = []
        for spec, pairs in self.bench.measured().items():
            share = self._shares.get(spec)
            if share is not None and share < 1 and spec.scope == rung.spec.scope:
                costs += [(p.seconds / p.dense_seconds - share) / (1 - share) for p in pairs if p.dense_seconds]
        skipped = min(max(statistics.median(costs), 0.0), 1.0) if costs else 0.0
        return rung.share + (1 - rung.share) * skipped

    def _finish(self, spec: CacheSpec) -> Profile:
        held_out = [self._run(spec, number, timed=True) for number in range(self.tuned, len(self.prompts))]
        speed = speed_up(held_out) or 1.0
        if speed < self.margins.min_speed_up:
            self._verdicts[spec] = "not faster"
            return self.off(
                f"{spec.describe()} keeps the target, but dense takes only {speed:.3g} times as long, below "
                f"min_speed_up={self.margins.min_speed_up:g}"
            )
        pairs = [*(self._run(spec, number) for number in range(self.tuned)), *held_out]
        self._verdicts[spec] = "chosen"
        kind = "most exact of those fast enough" if self.target.is_time else "fastest of those that keep the target"
        reason = (
            f"the {kind}: {spec.describe()}; {speed:.2f} times as fast as dense, {self._kept(pairs)} on {len(pairs)} "
            f"prompts, {len(held_out)} of them held out"
        )
        self.tell(f"chosen: {reason}")
        return self._made(spec, reason, pairs)

    def _kept(self, pairs: Sequence[Pair]) -> str:
        """The worst of all pairs, by what the target is about and by PSNR."""
        said = f"at least {min(pair.psnr for pair in pairs):.2f} dB PSNR"
        if self.target.kind == "ssim":
            return f"an SSIM of at least {min(pair.ssim for pair in pairs):.4f}, {said}"
        if self.target.kind == "rel_error":
            return f"a relative error of at most {max(pair.rel_error for pair in pairs):.3g}, {said}"
        return said

    def _made(self, spec: CacheSpec | None, reason: str, pairs: Sequence[Pair]) -> Profile:
        measured: dict[str, Any] = {}
        if pairs:
            held_out = list(pairs)[self.tuned :]
            measured = summary(pairs) | {"speed_up": speed_up(held_out), "held_out": len(held_out)}
            measured["pairs"] = records(pairs)
        floor = self.bench.floor
        return Profile(
            target=self.target,
            key=self.key,
            spec=spec,
            reason=reason,
            measured=measured,
            noise_floor={"psnr": floor.psnr, "ssim": floor.ssim, "rel_error": floor.rel_error, "runs": floor.runs},
            candidates=tuple(self._rows()),
            settings=self._settings(),
            alarms=alarms(pairs),
        )

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for spec, pairs in self.bench.measured().items():
            verdict = self._verdicts.get(spec, "measured")
            rows.append({"cache": spec.describe(), "verdict": verdict, **summary(pairs)})
        return sorted(rows, key=lambda row: -(row["speed_up"] or 0.0))

    def _settings(self) -> dict[str, Any]:
        return {
            "coverage": self.margins.coverage,
            "min_speed_up": self.margins.min_speed_up,
            "prompts": list(self.prompts[: self.tuned]),
            "held_out": list(self.prompts[self.tuned :]),
            "seed": self.sampler.seed,
            "call": dict(self.sampler.settings),
            "asked_steps": steps_of(self.sampler.pipe, self.sampler.settings),
            "generations": dict(self.bench.runs),
            "judged_by_held_out": len(self._judged),
            "left_out": dict(self._notes),
        }


def _decibels(error: float) -> float:
    return -20 * float(np.log10(max(error, 1e-9)))
