"""What plans keep: recall and error against plain loops, and the search for settings of a given density."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import dit_accel
from dit_accel.controls import AttentionCall, block_mass
from dit_accel.processors import (
    BlockRoutingAttnProcessor,
    GridAttnProcessor,
    NeighborhoodAttnProcessor,
    RadialAttnProcessor,
)
from dit_accel.processors.base import SparseAttnProcessor
from dit_accel.shapes.methods.contenders import ROWS, contenders
from dit_accel.shapes.methods.measure import CallKeeper, PlanQuality, density_on, measured_steps, plan_quality
from dit_accel.shapes.methods.runs import MethodSampler, Recipe
from dit_accel.tally import sparse_density

from .test_report_sampling import CLIP, settings

SIZE = ("--frames", "9", "--height", "128", "--width", "96", "--steps", "5")
LAST = (4,)  # behind the dense steps of every method


def test_recall_and_error_are_those_of_plain_loops() -> None:
    torch.manual_seed(0)
    query, key, value, output = (torch.randn(2, 3, 7, 4) for _ in range(4))
    mask = torch.rand(1, 3, 7, 7) < 0.4
    kept, far, norm = 0.0, 0.0, 0.0
    for batch in range(2):
        for head in range(3):
            for q in range(7):
                weights = [math.exp(float(query[batch, head, q] @ key[batch, head, k]) / 2) for k in range(7)]
                kept += sum(w for k, w in enumerate(weights) if mask[0, head, q, k]) / sum(weights)
                dense = torch.tensor(weights) @ value[batch, head] / sum(weights)
                far += float((output[batch, head, q] - dense).square().sum())
                norm += float(dense.square().sum())
    recall, error = plan_quality(mask, query, key, value, output)
    assert recall == pytest.approx(kept / (2 * 3 * 7), rel=1e-5)
    assert error == pytest.approx(math.sqrt(far / norm), rel=1e-5)
    assert plan_quality(None, query, key, value, output) == (None, error)


def test_long_sequences_are_looked_at_by_some_of_their_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value, output = (torch.randn(1, 2, 20, 4) for _ in range(4))
    mask = torch.rand(1, 2, 20, 20) < 0.4
    some = slice(0, None, 3)
    wanted = plan_quality(mask[:, :, some], query[:, :, some], key, value, output[:, :, some])
    monkeypatch.setattr("dit_accel.shapes.methods.measure.QUERIES", 7)
    assert plan_quality(mask, query, key, value, output) == pytest.approx(wanted)


def test_steps_lie_behind_the_dense_ones_and_in_the_run() -> None:
    assert measured_steps(20) == (7, 13, 19)
    assert measured_steps(50) == (19, 34, 49)
    assert measured_steps(1) == (0,)
    assert all(0 <= step < steps for steps in range(1, 60) for step in measured_steps(steps))


@pytest.fixture(scope="module")
def sampler(shapes_wan: Path) -> MethodSampler:
    """A grid of 3 x 16 x 12 tokens."""
    return MethodSampler(settings(shapes_wan, *SIZE))


def looked_at(sampler: MethodSampler, recipe: SparseAttnProcessor, control: CallKeeper | PlanQuality) -> None:
    sampler.recipes["it"] = Recipe(recipe, None)
    sampler.control = control
    sampler.sample(CLIP, 0, "dense" if isinstance(control, CallKeeper) else "it")
    sampler.control = None


@pytest.mark.parametrize(
    "recipe",
    [
        RadialAttnProcessor(block=64, dense_steps=1, dense_layers=0),
        NeighborhoodAttnProcessor(window=0.5, block=64, dense_steps=1),
        BlockRoutingAttnProcessor(amount=0.5, block=64, dense_steps=1, dense_layers=0),
        GridAttnProcessor(density=0.5, block=64, dense_steps=1, dense_layers=0),  # chooses by values, too
    ],
    ids=["radial", "neighborhood", "block_routing", "grid"],
)
def test_the_density_on_kept_calls_is_that_of_a_run(sampler: MethodSampler, recipe: SparseAttnProcessor) -> None:
    keeper = CallKeeper(LAST)
    looked_at(sampler, recipe, keeper)
    assert {call.at.state.step for call in keeper.calls} == {*LAST}
    layers = {call.at.site.path for call in keeper.calls}
    assert len(keeper.calls) == len(layers)  # one branch of guidance
    sampler.sample(CLIP, 0, "it")
    assert sampler.report is not None
    found = density_on(keeper.calls)(recipe, None)
    assert found == pytest.approx(sparse_density(sampler.report.sites), abs=1e-6)
    assert density_on([])(recipe, None) is None


def test_a_plan_of_everything_has_recall_one(sampler: MethodSampler) -> None:
    recipe = BlockRoutingAttnProcessor(amount=1.0, block=64, dense_steps=1, dense_layers=0)
    quality = PlanQuality(recipe, LAST)
    looked_at(sampler, recipe, quality)
    found = quality.result()
    assert found["recall"] == pytest.approx(1, abs=1e-4)
    assert found["output_error"] == pytest.approx(0, abs=1e-4)
    assert set(found["by_layer"]) == {str(layer) for layer in range(len(found["by_layer"]))}


def test_recall_at_work_is_that_of_the_plan_that_was_followed(sampler: MethodSampler) -> None:
    recipe = BlockRoutingAttnProcessor(amount=0.3, block=64, dense_steps=1, dense_layers=0, search_every=2)
    quality, seen = PlanQuality(recipe, LAST), AllMasses()
    sampler.recipes["it"] = Recipe(recipe, None)
    with dit_accel.accelerate(sampler.pipe, recipe, controls=[quality, seen]):
        quality.attach(sampler.pipe)
        seen.attach(sampler.pipe)
        sampler.pipe(CLIP, **sampler._arguments(0))
    assert quality.result()["recall"] == pytest.approx(sum(seen.kept) / len(seen.kept), abs=1e-3)
    assert 0.2 < quality.result()["recall"] < 0.99


class AllMasses(PlanQuality):
    """The same by another way: block masses of the call, summed over the blocks that the plan lists."""

    def __init__(self) -> None:
        super().__init__(BlockRoutingAttnProcessor(dense_steps=1, dense_layers=0), LAST)
        self.kept: list[float] = []

    def record(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> None:
        site = self._sites[call.site]
        plan = site.plan if site.found is None else site.found
        assert plan is not None
        if self._is_first(call):
            mass = block_mass(query, key, 64) * plan.to_bool()
            sizes = torch.tensor([min(64, query.shape[2] - 64 * row) for row in range(mass.shape[2])])
            self.kept.append(float((mass.sum(-1) * sizes).sum() / query.shape[2] / mass.shape[0] / mass.shape[1]))


def test_what_runs_dense_is_passed_over(sampler: MethodSampler) -> None:
    recipe = BlockRoutingAttnProcessor(block=64, dense_steps=5)
    quality = PlanQuality(recipe, LAST)
    looked_at(sampler, recipe, quality)
    assert quality.result() == {"recall": None, "output_error": None, "by_layer": {}}


def test_every_method_takes_part_and_names_are_unique() -> None:
    from dit_accel.processors import ATTENTION

    everyone = contenders()
    assert len({each.name for each in everyone}) == len(everyone)
    assert {each.method for each in everyone} == {*ATTENTION}
    assert {method for _, method, *_ in ROWS} <= {*ATTENTION}
    for each in everyone:
        turned = each.knobs[0].turned(0.25) if each.knobs else {}
        assert each.recipe(turned).settings()["dense_layers"] in (0, 1)
    with pytest.raises(ValueError, match=r"nobody is called 'radiall'; choose among radial; neighborhood"):
        contenders(["radiall"])
