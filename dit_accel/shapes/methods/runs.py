"""Renders every prompt dense and with every contender, and keeps each result as soon as there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...inspect.tuning import Options, tune
from ...tally import sparse_density
from ..report.bench import Bench, likeness
from ..report.records import Record
from ..report.results import DENSE, Results, plain
from ..report.sampling import Sample, Sampler, tell
from ..report.settings import Settings
from ..report.subsets import Subset
from .contenders import Contender
from .measure import CallKeeper, PlanQuality, density_on, measured_steps

if TYPE_CHECKING:
    from ...acceleration import Acceleration
    from ...install.permutation import OrderFor
    from ...processors import SparseAttnProcessor
    from ...report import Report

REFUSALS = (ValueError, NotImplementedError)  # a method that cannot act on this model


class Recipe(NamedTuple):
    """A contender ready to run: its method, and the token order of the whole model."""

    processor: SparseAttnProcessor
    order_for: OrderFor | None


class MethodSampler(Sampler):
    """A sampler that knows contenders by their names; see :class:`Sampler`.

    Attributes:
        recipes: by name.
        control: acts in every run while it is there.
        report: of the latest run with a contender.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.recipes: dict[str, Recipe] = {}
        self.control: CallKeeper | PlanQuality | None = None
        self.report: Report | None = None

    def sample(self, prompt: str, index: int, attention: str) -> Sample:
        """As there; the density of sparse calls alone is said, too."""
        sample = super().sample(prompt, index, attention)
        if attention == DENSE or self.report is None or sample.attention is None:
            return sample
        return sample._replace(attention=sample.attention | {"sparse_density": sparse_density(self.report.sites)})

    def _arguments(self, index: int) -> dict[str, Any]:
        """As there; what is only looked at needs no decoding."""
        return super()._arguments(index) | ({} if self.control is None else {"output_type": "latent"})

    @contextmanager
    def _accelerated(self, attention: str) -> Iterator[Acceleration | None]:
        import dit_accel

        if attention == DENSE and self.control is None:
            yield None
            return
        processor, order_for = (None, None) if attention == DENSE else self.recipes[attention]
        controls = () if self.control is None else (self.control,)
        with dit_accel.accelerate(self.pipe, processor, controls=controls, token_order=order_for) as acceleration:
            if isinstance(self.control, PlanQuality):
                self.control.attach(self.pipe)
            yield acceleration
            self.report = acceleration.report()


class MethodBench(Bench[MethodSampler]):
    """Brings contenders to their settings, looks at their plans, and renders prompts.

    Args:
        sampler: of the model.
        subset: its prompts.
        results: where all is kept, and what is there already.
        target: density that is to be equal, in (0, 1].
    """

    def __init__(self, sampler: MethodSampler, subset: Subset, results: Results, target: float) -> None:
        super().__init__(sampler, subset, results)
        self.target = target
        self.steps = measured_steps(sampler.settings.steps)
        self._density: Callable[..., float | None] | None = None
        self._ran = {DENSE}  # who ran in this process; dense does first of all

    def settle(self, everyone: Sequence[Contender], chosen: Sequence[Contender]) -> list[tuple[Contender, Record]]:
        """Finds the settings of the contenders that are chosen, tuned where there are knobs, and looks at their plans.

        Returns:
            with each contender, ``options``, ``settings`` (all of the method) and ``refusal`` (why it cannot act, or
            None); others of ``everyone`` are there as an earlier run left them.
        """
        found = [(each, self._settle(each) if each in chosen else self._known(each)) for each in everyone]
        return [(each, settled) for each, settled in found if settled is not None]

    def render(self, index: int, contenders: Sequence[Contender]) -> None:
        """Renders what is missing of a prompt, dense and by contenders, in an order that differs between prompts."""
        missing = [each.name for each in contenders if not self._rendered(each.name, index)]
        if not missing and self.results.get(DENSE, DENSE, index):
            return
        self.warm_up()
        everyone = [DENSE, *(each.name for each in contenders)]
        turn = index % len(everyone)
        dense: Sample | None = None
        waiting: list[tuple[str, Sample]] = []  # for the dense one, without which they cannot be compared
        for way in [*everyone[turn:], *everyone[:turn]]:
            if way != DENSE and way not in missing:
                continue
            sample = self._timed(index, way)
            if way == DENSE:
                dense = sample
                self._keep_dense(index, sample)
            else:
                waiting.append((way, sample))
            while dense is not None and waiting:
                self._keep(index, *waiting.pop(0), dense)

    def _timed(self, index: int, way: str) -> Sample:
        """A run whose time counts: on a GPU not the first of a contender, in which kernels are loaded."""
        prompt = self.subset.prompts[index].prompt
        if way not in self._ran and self._on_gpu():
            self.sampler.sample(prompt, index, way)
        self._ran.add(way)
        return self.sampler.sample(prompt, index, way)

    def _on_gpu(self) -> bool:
        return torch.device(self.sampler.settings.device).type != "cpu"

    def _settle(self, contender: Contender) -> Record:
        found = self._known(contender)
        if found is None or not _is_still(contender, found):
            found = self._settled(contender)
            self.results.add("settled", contender.name, _asked(contender) | found)
            tell(f"{contender.name}: {found['refusal'] or found['options']}")
        if found["refusal"] is not None:
            return found
        recipe = contender.recipe(found["options"])
        self.sampler.recipes[contender.name] = Recipe(recipe, contender.order_for(recipe))
        return found | {"refusal": self._look_at_plans(contender, recipe)}

    def _known(self, contender: Contender) -> Record | None:
        return self.results.get("settled", contender.name, **_asked(contender))

    def _settled(self, contender: Contender) -> Record:
        options: Options = {}
        if contender.knobs:
            self.warm_up()  # tuning needs a run
        try:
            recipe = contender.recipe(options)
            if contender.knobs:
                options = self._tuned(contender)
                recipe = contender.recipe(options)
            contender.order_for(recipe)
        except REFUSALS as error:
            return {"options": options, "settings": {}, "refusal": str(error)}
        return {"options": options, "settings": recipe.settings(), "refusal": None}

    def _tuned(self, contender: Contender) -> Options:
        if self._density is None:
            keeper = CallKeeper(self.steps)
            self._with(keeper, DENSE)
            self._density = density_on(keeper.calls)
        density = self._density

        def of(options: Options) -> float | None:
            recipe = contender.recipe(options)
            return density(recipe, contender.order_for(recipe))

        return tune(of, contender.knobs, self.target)[0]

    def _look_at_plans(self, contender: Contender, recipe: SparseAttnProcessor) -> str | None:
        """A run of the first prompt that is not timed; says why the contender cannot act, or None."""
        if self.results.get("plans", contender.name, settings=recipe.settings()) is not None:
            return None
        self.warm_up()
        quality = PlanQuality(recipe, self.steps)
        try:
            self._with(quality, contender.name)
        except REFUSALS as error:  # not kept: what was missing may be there next time
            tell(f"{contender.name}: {error}")
            return str(error)
        result = quality.result()
        self.results.add("plans", contender.name, {"settings": recipe.settings(), **result})
        tell(f"{contender.name}: recall {result['recall']}, error of the output {result['output_error']}")
        return None

    def _with(self, control: CallKeeper | PlanQuality, way: str) -> None:
        self.sampler.control = control
        try:
            self.sampler.sample(self.subset.prompts[0].prompt, 0, way)
            self._ran.add(way)
        finally:
            self.sampler.control = None

    def _rendered(self, name: str, index: int) -> bool:
        settings = self.sampler.recipes[name].processor.settings()
        return self.results.get("run", name, index, settings=settings) is not None

    def _keep(self, index: int, name: str, sample: Sample, dense: Sample) -> None:
        content = {
            "settings": self.sampler.recipes[name].processor.settings(),
            **self._judged(index, sample),
            "dense_sampling_seconds": round(dense.sampling_seconds, 3),
            **likeness(sample, dense),
            **(sample.attention or {}),
        }
        self.results.add("run", name, content, index)
        speedup = dense.sampling_seconds / sample.sampling_seconds
        tell(f"[{index + 1}/{len(self.subset.prompts)}] {name}: PSNR {content['psnr_db']}, {speedup:.2f} x")


def _asked(contender: Contender) -> Record:
    return {"method": contender.method, "asked": contender.options, "order": contender.order}


def _is_still(contender: Contender, settled: Record) -> bool:
    """Whether the settings are still those of the method, whose defaults may have changed since."""
    if settled["refusal"] is not None:
        return False
    return bool(plain(contender.recipe(settled["options"]).settings()) == settled["settings"])
