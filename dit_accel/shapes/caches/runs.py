"""Renders every prompt with every contender, dense runs in between, and keeps each result as soon as there is one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...metrics import psnr
from ...roots import find_roots
from ...tally import sparse_density
from ..report.bench import Bench, likeness
from ..report.judging import decibels, temporal
from ..report.records import Record
from ..report.results import DENSE, Results
from ..report.sampling import Sample, Sampler, tell
from ..report.settings import Settings, model_info
from ..report.subsets import Subset, calibration_words
from .contender import Contender, Options
from .work import Work

if TYPE_CHECKING:
    from ...acceleration import Acceleration
    from ...report import Report


class CacheSampler(Sampler):
    """A sampler that knows contenders by their names; see :class:`Sampler`.

    Attributes:
        ready: contenders with what was found for them, by name.
        work: of the latest run.
        report: of the latest run, if it was with one of ours.
        only_latents: whether runs are left undecoded, for those that are only looked at.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.ready: dict[str, tuple[Contender, Options]] = {}
        self.work = Work(())
        self.report: Report | None = None
        self.only_latents = False

    def sample(self, prompt: str, index: int, attention: str) -> Sample:
        """As there; looking at memory, in runs of the first prompt, takes no time of theirs."""
        roots = list(find_roots(self.pipe).values())
        self.work = Work(roots, self.settings.steps - 1 if index == 0 else None)  # the middle of two calls a step
        self.report = None
        with self.work.watched():
            sample = super().sample(prompt, index, attention)
        return sample._replace(sampling_seconds=sample.sampling_seconds - self.work.paused)

    def generate(self) -> None:
        """One generation up to the latents, to calibrate on: its sentence and its noise are none of those judged."""
        words = calibration_words(model_info(self.settings.model))
        self.pipe(words.prompt, **(self._arguments(-1) | {"output_type": "latent"}))

    @contextmanager
    def _accelerated(self, attention: str) -> Iterator[Acceleration | None]:
        if attention == DENSE:
            yield None
            return
        contender, found = self.ready[attention]
        acceleration: Acceleration | None = contender.install(self.pipe, self.settings.steps, found)
        try:
            yield acceleration
            self.report = None if acceleration is None else acceleration.report()
        finally:
            contender.remove(self.pipe)


class CacheBench(Bench[CacheSampler]):
    """Calibrates contenders, and renders prompts.

    Args:
        sampler: of the model.
        subset: its prompts.
        results: where all is kept, and what is there already.
        every: so many contenders between two dense runs, with both of which each of them is compared.
    """

    def __init__(self, sampler: CacheSampler, subset: Subset, results: Results, every: int) -> None:
        super().__init__(sampler, subset, results)
        self.every = every

    def settle(self, contenders: Sequence[Contender]) -> None:
        """Calibrates those that were not yet, and puts each on the pipeline once to see whether it can act."""
        for each in contenders:
            self._settle(each)

    def known(self, contender: Contender) -> Record | None:
        """What was settled last, now or in an earlier run.

        Returns:
            ``found`` (by calibration) and ``refusal`` (why it cannot act, or None); None if nothing was.
        """
        return self.results.get("settled", contender.name, settings=contender.key)

    def render(self, index: int, contenders: Sequence[Contender]) -> None:
        """Renders what is missing of a prompt, in an order that differs between prompts: dense, some, dense ..."""
        missing = [each for each in contenders if each.name in self.sampler.ready and not self._rendered(each, index)]
        turn = index % len(missing) if missing else 0
        missing = [*missing[turn:], *missing[:turn]]
        if not missing and self.results.get(DENSE, DENSE, index) is not None:
            return
        self.warm_up()
        before = self._dense(index)
        while missing:
            group, missing = missing[: self.every], missing[self.every :]
            done = [(each, *run) for each in group if (run := self._sampled(each, index)) is not None]
            after = self._dense(index)
            for each, sample, found in done:
                self._keep(index, each, sample, found, (before, after))
            before = after

    def _settle(self, contender: Contender) -> None:
        found = self.known(contender)
        if found is None:
            self.warm_up()  # before calibration
        if found is None or found["refusal"] is not None:
            found = self._settled(contender)
            self.results.add("settled", contender.name, found)
        if found["refusal"] is None:
            self.sampler.ready[contender.name] = contender, found["found"]

    def _settled(self, contender: Contender) -> Record:
        pipe, steps = self.sampler.pipe, self.sampler.settings.steps
        content: Record = {"settings": contender.key, "found": {}, "refusal": None}
        try:
            content["found"] = self._shared(contender) or contender.calibrate(pipe, self.sampler.generate, steps)
            contender.install(pipe, steps, content["found"])
            contender.remove(pipe)
        except contender.refusals as error:
            tell(f"{contender.name}: {error}")
            content["refusal"] = str(error) or type(error).__name__
        return content

    def _shared(self, contender: Contender) -> Options:
        """What the calibration of another row of the same curve found, where it is the same for all of them."""
        for other, found in self.sampler.ready.values():
            if found and type(other) is type(contender) and other.shares_calibration(contender):
                return found
        return {}

    def _sampled(self, contender: Contender, index: int) -> tuple[Sample, Record] | None:
        try:
            sample = self.sampler.sample(self.subset.prompts[index].prompt, index, contender.name)
        except contender.refusals as error:
            refused = {"settings": contender.key, "found": {}, "refusal": str(error) or type(error).__name__}
            self.results.add("settled", contender.name, refused)
            del self.sampler.ready[contender.name]
            tell(f"{contender.name}: {error}")
            return None
        return sample, self._measured()

    def _measured(self) -> Record:
        """What the latest run computed and kept; of ours also what the report says."""
        work, report = self.sampler.work, self.sampler.report
        content: Record = {"products": work.products, "grown": work.grown}
        if report is None:
            return content
        return content | {
            "sparse_density": sparse_density(report.sites),
            "caches": [_decisions(cache.to_dict()) for cache in report.caches],
        }

    def _rendered(self, contender: Contender, index: int) -> bool:
        return self.results.get("run", contender.name, index, settings=contender.key) is not None

    def _dense(self, index: int) -> Sample:
        sample = self.sampler.sample(self.subset.prompts[index].prompt, index, DENSE)
        self._keep_dense(index, sample)
        return sample

    def _judged(self, index: int, sample: Sample) -> Record:
        """As there; of dense runs also what they compute, which is what contenders are compared with."""
        return super()._judged(index, sample) | self._measured()

    def _keep(
        self, index: int, contender: Contender, sample: Sample, found: Record, dense: tuple[Sample, Sample]
    ) -> None:
        seconds = statistics.mean(each.sampling_seconds for each in dense)
        base = self.results.get(DENSE, DENSE, index)
        assert base is not None
        content = {
            "settings": contender.key,
            **super()._judged(index, sample),
            "dense_sampling_seconds": round(seconds, 3),
            **likeness(sample, dense[0]),
            **temporal(sample.video, dense[0].video),
            "dense_again_db": decibels(psnr(*(each.video for each in dense))),  # whether all of it came off again
            "computed_share": round(found["products"] / base["products"], 4),
            "kept_bytes": None if found["grown"] is None else found["grown"] - base["grown"],
            **{name: value for name, value in found.items() if name not in ("products", "grown")},
        }
        self.results.add("run", contender.name, content, index)
        speedup = seconds / sample.sampling_seconds
        place = f"[{index + 1}/{len(self.subset.prompts)}] {contender.name}"
        tell(f"{place}: PSNR {content['psnr_db']}, computed {content['computed_share']}, {speedup:.2f} x")


def _decisions(report: Record) -> Record:
    """The part of a cache's report that the table keeps: counts and reasons."""
    return {name: report[name] for name in ("name", "reasons", "bytes_most") if name in report}
