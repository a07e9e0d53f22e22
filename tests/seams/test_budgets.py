"""Budgets of a schedule reach the plans: by step, layer and head, in eager and in compiled models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel import Schedule
from dit_accel.plan import radial_plan
from dit_accel.processors import RadialAttnProcessor, processor_by_name

ODD = {"height": 240, "width": 208, "num_frames": 13}  # 4 x 15 x 13 tokens, 13 blocks of 64; 2 layers of 2 heads
STEPS = 6
SCHEDULE: dict[str, Any] = {
    "dense_steps": 1,
    "dense_layers": 0,
    "step_budget": [[0, 2.0], [0.5, 1.0], [4, 0.25]],
    "layer_budget": {"1": 0.5},
    "head_budget": {"0": [1.0, 1.5]},
}


def factors_at(step: int, layer: int) -> list[float]:
    of_step = 2.0 if step < 3 else 1.0 if step < 4 else 0.25
    return [of_step * (0.5 if layer else 1.0) * head for head in ((1.0, 1.5) if layer == 0 else (1.0, 1.0))]


def watched(processor: Any) -> list[tuple[int, str, int, Any]]:
    """Where each search was, and its plan; sites are prepared in the order in which they run."""
    found: list[tuple[int, str, int, Any]] = []
    coming: dict[int, tuple[int, str]] = {}
    stock_at_step, stock_search = processor.at_step, processor.search

    def at_step(setup: Any, site: Any, state: Any) -> Any:
        coming[site.layer] = (state.step, state.branch)
        return (site.layer, stock_at_step(setup, site, state))

    def search(query: Any, key: Any, setup: Any, memory: Any, *, scale: Any) -> Any:
        layer, own = setup
        plan, kept = stock_search(query, key, own, memory, scale=scale)
        found.append((*coming[layer], layer, plan))
        return plan, kept

    processor.at_step, processor.search = at_step, search
    return found


@pytest.mark.parametrize(
    ("method", "options", "budget"),
    [
        ("block_routing", {"amount": 0.25, "block": 64}, 0.25 * 13),
        ("block_routing", {"amount": 5, "block": 64, "score": "sub_block"}, 5),
        ("compensated", {"density": 0.3}, 0.3 * 13),
        ("adaspa", {"density": 0.3, "levels": False, "search_again": [*range(STEPS)]}, 0.3 * 13),
    ],
)
def test_rows_keep_as_many_blocks_as_the_schedule_says(t2v, method, options, budget):
    processor = processor_by_name(method, **options, schedule=SCHEDULE)
    found = watched(processor)
    with dit_accel.accelerate(t2v.pipe, processor) as handle:
        t2v.run(**ODD, num_inference_steps=STEPS)
        report = handle.report()
    assert len(found) == (STEPS - 1) * 2 * 2
    for step, _, layer, plan in found:
        for head, factor in enumerate(factors_at(step, layer)):
            wanted = max(1, min(13, math.ceil(budget * factor - 1e-9)))
            assert (plan.counts[0, head] == wanted).all(), (step, layer, head)
    assert report.sites[1].kept < report.sites[0].kept


def test_cells_of_vmoba_follow_too(t2v):
    processor = processor_by_name("vmoba", select="top_k", scope="query", amount=4, cube=(2, 5, 13), patch=(5, 13),
                                  chunk=1, schedule=SCHEDULE)  # fmt: skip
    found = watched(processor)
    with dit_accel.accelerate(t2v.pipe, processor):
        t2v.run(**ODD, num_inference_steps=STEPS)
    kept = {(step, layer): plan.element_mask().double().mean((0, 2, 3)) for step, _, layer, plan in found}
    # Layer 0 has 4 chunks, layer 1 has 3 patches; a row of queries may lie in two of them, which are then kept anyway.
    assert (kept[1, 0] == 1).all() and (kept[3, 0] == 1).all()
    assert kept[4, 0][0] < kept[4, 0][1] < 1  # 1 and 2 of 4
    assert kept[4, 1][0] < kept[3, 1][0] < kept[1, 1][0] == 1  # 1, 2 and 4 of 3


@pytest.mark.parametrize(("method", "options"), [("block_routing", {"search_every": 99, "block": 64}), ("adaspa", {})])
def test_a_kept_plan_of_another_budget_is_searched_for_anew(t2v, method, options):
    schedule = {"dense_steps": 1, "dense_layers": 0, "step_budget": [[0, 2.0], [2, 2.0], [3, 1.0], [5, 2.0]]}
    options = options | ({"search_again": []} if method == "adaspa" else {})
    processor = processor_by_name(method, **options, schedule=schedule)
    found = watched(processor)
    with dit_accel.accelerate(t2v.pipe, processor):
        t2v.run(**ODD, num_inference_steps=STEPS)
    places = [(step, branch, layer) for step, branch, layer, _ in found]
    # Not at step 2: the factor is the same there.
    assert places == [(s, branch, layer) for s in (1, 3, 5) for branch in ("cond", "uncond") for layer in (0, 1)]


@pytest.mark.parametrize("method", ["block_routing", "radial"])
def test_factors_of_one_change_nothing(t2v, method):
    plain = {"dense_steps": 1, "dense_layers": 0}
    ones = plain | {"step_budget": [[0, 1.0]], "layer_budget": {0: 1.0}}
    runs = []
    for schedule in (plain, ones):
        with dit_accel.accelerate(t2v.pipe, method, block=64, schedule=schedule):
            runs.append(t2v.run(**ODD))
    assert torch.equal(*runs)


class Followed(dit_accel.AttentionControl):
    """The density of the plan that every call follows."""

    def __init__(self):
        super().__init__()
        self.handle, self.densities = None, {}

    def before(self, call, query, key, value):
        sites = [site for installed in self.handle._installed for site in installed.sites.values()]
        plan = next(site.plan for site in sites if site.info == call.site)
        self.densities[call.state.step, call.site.layer] = None if plan is None else plan.density
        return query, key, value


def test_bands_of_radial_attention_follow_the_schedule(t2v, monkeypatch):
    built = []
    stock = RadialAttnProcessor.build_plan
    monkeypatch.setattr(
        RadialAttnProcessor, "build_plan", lambda self, *a: (built.append(self.decay), stock(self, *a))[1]
    )
    schedule = {name: value for name, value in SCHEDULE.items() if name != "head_budget"}
    options: dict[str, Any] = {"block": 64, "decay": 1.5, "mask": "element", "sink": False}
    followed = Followed()
    with dit_accel.accelerate(t2v.pipe, "radial", controls=[followed], schedule=schedule, **options) as handle:
        followed.handle = handle
        t2v.run(**ODD, num_inference_steps=STEPS)
        # 2, 1, 0.5, 0.25 and 0.125 times the decay, each plan built once, also in a second run.
        assert sorted(built) == [0.1875, 0.375, 0.75, 1.5, 3.0]
        t2v.run(**ODD, num_inference_steps=STEPS, seed=2)
        assert len(built) == 5
    options.pop("decay")
    for (step, layer), density in followed.densities.items():
        if step == 0:
            assert density is None
            continue
        decay = 1.5 * factors_at(step, 1 if layer else 0)[0]
        assert density == radial_plan((4, 15, 13), decay=decay, **options).density
    assert len(set(followed.densities.values())) > 2


def test_second_run_equals_a_fresh_run(t2v):
    def install():
        t2v.pipe.set_attn_processor(processor_by_name("block_routing", block=64, search_every=2, schedule=SCHEDULE))

    install()
    t2v.run(seed=5, **ODD, num_inference_steps=STEPS)
    t2v.run(seed=6, num_inference_steps=3)
    second = t2v.run(**ODD, num_inference_steps=STEPS)
    install()
    assert torch.equal(t2v.run(**ODD, num_inference_steps=STEPS), second)


@pytest.mark.parametrize(
    ("method", "options"),
    [("block_routing", {}), ("compensated", {"density": 0.3}), ("vmoba", {"select": "top_k", "boundaries": "keep"})],
)
def test_nothing_is_read_from_the_device_for_a_budget(t2v, method, options, monkeypatch):
    reads: list[str] = []
    schedule = SCHEDULE | {"dense_steps": 0}
    with dit_accel.accelerate(t2v.root, method, **options, schedule=schedule, backend="reference") as handle:
        for step in (0, 3, 4, 5):
            handle.clock.set_step(step, STEPS)
            latents, time = torch.randn(1, 16, 4, 30, 26), torch.tensor([900 - step])
            with torch.no_grad():
                t2v.root(latents, time, t2v.inputs["prompt_embeds"], return_dict=False)
            for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
                stock = getattr(torch.Tensor, name)
                monkeypatch.setattr(torch.Tensor, name, lambda *a, n=name, s=stock: reads.append(n) or s(*a))
        assert reads == []


def test_a_model_of_other_heads_is_refused_and_left_as_it_was(t2v):
    stock = t2v.run(**ODD)
    for budget, message in (
        ({"head_budget": {1: [1.0, 1.0, 0.5]}}, r"3 factors for layer 1, but blocks\.1\.attn1 has 2 heads"),
        ({"layer_budget": {2: 0.5}}, "layer_budget names layer 2; this model has layers 0 to 1"),
        ({"dense_layers": [0, 7, 5]}, "dense_layers names layer 5; this model has layers 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dit_accel.accelerate(t2v.pipe, "block_routing", schedule=Schedule(**budget))
    assert dit_accel.acceleration_of(t2v.pipe) is None and torch.equal(t2v.run(**ODD), stock)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("method", "options", "graphs"),
    [
        ("block_routing", {"block": 64}, 2),  # dense and search
        ("compensated", {"density": 0.3}, 2),
        ("adaspa", {"density": 0.3}, 4),  # dense, the first search, following, later searches
        ("vmoba", {"select": "top_k"}, 2),
    ],
)
def test_another_budget_is_no_other_graph(t2v, method, options, graphs):
    counter = CompileCounter()
    with dit_accel.accelerate(t2v.pipe, method, **options, schedule=SCHEDULE) as handle:
        eager = t2v.run(**ODD, num_inference_steps=10)
        expected = handle.report()
        t2v.root.compile(fullgraph=True, backend=counter)
        handle.reset_report()
        assert torch.equal(t2v.run(**ODD, num_inference_steps=10), eager)
        assert handle.report() == expected
        assert counter.frame_count == graphs
        with torch._dynamo.config.patch(error_on_recompile=True):
            t2v.run(**ODD, num_inference_steps=10, seed=3)


@pytest.mark.usefixtures("fresh_dynamo")
def test_bands_of_other_widths_are_no_other_graph(t2v):
    schedule = {name: value for name, value in SCHEDULE.items() if name != "head_budget"}
    options: dict[str, Any] = {"block": 64, "decay": 1.5, "mask": "element", "sink": False}
    counter = CompileCounter()
    with dit_accel.accelerate(t2v.pipe, "radial", **options, schedule=schedule):
        eager = t2v.run(**ODD, num_inference_steps=10)
        t2v.root.compile(fullgraph=True, backend=counter)
        assert torch.equal(t2v.run(**ODD, num_inference_steps=10), eager)
        assert counter.frame_count == 2  # dense and sparse
        with torch._dynamo.config.patch(error_on_recompile=True):
            t2v.run(**ODD, num_inference_steps=10, seed=3)
