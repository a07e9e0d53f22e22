"""Agent attention in whole pipelines: the seam of methods that compute attention themselves."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.kernels.token_order import morton_order
from dit_accel.processors import AgentAttnProcessor, OperatorAttnProcessor

NAMES = ("wan", "flux", "sd3", "sd35", "sd15", "sdxl")
LATENT = {"latents": torch.randn(1, 4, 16, 20, generator=torch.Generator().manual_seed(0))}
SIZES = {  # at which agents save something, and another
    "wan": ({"height": 80, "width": 112, "num_frames": 9}, {"height": 64, "width": 80, "num_frames": 9}),
    "sd15": (LATENT, {"latents": LATENT["latents"][..., :11, :13]}),
}
SETTINGS = {"dense_steps": 0, "seed": 3}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(name, make_image_subject, t2v):
    return t2v if name == "wan" else make_image_subject(name)


def sizes_of(name):
    return SIZES.get("sd15" if name == "sdxl" else name, ({"height": 28, "width": 20}, {"height": 16, "width": 24}))


class Spy(AgentAttnProcessor):
    """Notes every set-up that a call was given, and what it returned beside what the call would have been."""

    def __init__(self, **settings):
        super().__init__(**SETTINGS | settings)
        self.given, self.places = [], []

    def at_step(self, setup, site, state):
        found = super().at_step(setup, site, state)
        self.places.append((state.step, state.branch, site.path, found))
        return found

    def attend(self, query, key, value, setup, *, scale):
        self.given.append((query.shape, setup))
        return super().attend(query, key, value, setup, scale=scale)


def test_report_counts_the_cost_of_every_call(name, model):
    size, spy = sizes_of(name)[0], Spy()
    with dit_accel.accelerate(model.pipe, spy) as handle:
        model.run(**size, num_inference_steps=5)
        report = handle.report()
    costs = [1.0 if found is None else spy.cost(found) for *_, found in spy.places]
    sparse = [cost for cost in costs if cost < 1]
    assert len(spy.given) == len(sparse) > 0
    assert sum(site.sparse_calls for site in report.sites) == len(sparse)
    assert sum(site.dense_calls for site in report.sites) == len(costs) - len(sparse)
    assert report.density == pytest.approx(sum(costs) / len(costs))
    assert report.plan_density == pytest.approx(sum(sparse) / len(sparse))
    assert report.fallbacks == {} and report.backend == "torch"
    dense = {site.path.split(":")[1] for site in report.sites if not site.sparse_calls}
    assert dense == {path for *_, path, found in spy.places if found is None}
    assert all(path.startswith("mid_block") for path in dense) and bool(dense) is (name in ("sd15", "sdxl"))


def test_warm_up_is_that_of_the_family(name, model):
    with dit_accel.accelerate(model.pipe, "agent") as handle:
        model.run(**sizes_of(name)[0], num_inference_steps=5)
        sites = handle.report().sites
    calls = {"wan": 2, "flux": 2}.get(name, 1)
    wanted = {10 * calls // 2} if name.startswith("sd1") or name == "sdxl" else {3 * calls}  # 0.24 of 5 is 2
    assert {site.sparse_calls for site in sites if site.sparse_calls} == wanted


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_stages_of_a_unet_and_the_draws_of_its_branches(name, model):
    """Guidance is one batched call there: both items have the same destinations."""
    spy = Spy()
    with dit_accel.accelerate(model.pipe, spy):
        model.run(**LATENT, num_inference_steps=5)
    acting = [(step, path, found) for step, _, path, found in spy.places if found is not None]
    assert [found.cell[1] for _, _, found in acting] == [4 if step < 2 else 2 for step, *_ in acting]
    assert all(shape[0] == 2 and setup.destinations.shape[0] == 1 for shape, setup in spy.given)
    draws = {(step, path): tuple(found.destinations[0].tolist()) for step, path, found in acting}
    assert len(set(draws.values())) == len(draws) == 5 * len({path for _, path, _ in acting})


@pytest.mark.parametrize("name", ["wan", "flux", "sd35", "sd15"])
def test_second_run_equals_a_fresh_run(name, model):
    size, other = sizes_of(name)
    with dit_accel.accelerate(model.pipe, "agent", **SETTINGS):
        model.run(seed=5, **size, num_inference_steps=3)
        model.run(seed=6, **other, num_inference_steps=5)
        torch.manual_seed(8)
        second = model.run(**size, num_inference_steps=3)
    with dit_accel.accelerate(model.pipe, "agent", **SETTINGS):
        torch.manual_seed(9)
        assert torch.equal(model.run(**size, num_inference_steps=3), second)
    if name == "sd15":
        with dit_accel.accelerate(model.pipe, "agent", **SETTINGS | {"seed": 4}):
            assert not torch.equal(model.run(**size, num_inference_steps=3), second)


@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "sd15"])
def test_a_batch_equals_its_samples(name, model):
    size = sizes_of(name)[0]
    prompts = {key: torch.randn(2, *part.shape[1:]) for key, part in model.inputs.items() if "embeds" in key}
    noise = torch.randn(2, *model.run(**size, num_inference_steps=1).shape[1:])
    with dit_accel.accelerate(model.pipe, "agent", **SETTINGS):
        together = model.run(**size | prompts | {"latents": noise}, num_inference_steps=3)
        for i in range(2):
            one = {key: part[i : i + 1] for key, part in (prompts | {"latents": noise}).items()}
            assert torch.allclose(model.run(**size | one, num_inference_steps=3)[0], together[i], atol=1e-4)


def test_removal_is_bit_equal(name, model):
    size = sizes_of(name)[0]
    stock = model.run(**size)
    handle = dit_accel.accelerate(model.pipe, "agent", **SETTINGS)
    assert not torch.allclose(model.run(**size), stock, atol=1e-4)
    handle.remove()
    sites = [site for installed in handle._installed for site in installed.sites.values()]
    assert all(site.operator is None and site.setup is None and not site._set_ups for site in sites)
    assert torch.equal(model.run(**size), stock)
    model.pipe.set_attn_processor(AgentAttnProcessor(**SETTINGS))
    assert not torch.allclose(model.run(**size), stock, atol=1e-4)


def test_a_token_permutation_changes_nothing(t2v):
    """Tiles are those of the grid, whatever the order of tokens."""
    size = SIZES["wan"][0]
    with dit_accel.accelerate(t2v.pipe, "agent", **SETTINGS):
        plain = t2v.run(**size)
    with dit_accel.accelerate(t2v.pipe, "agent", **SETTINGS, token_order=lambda layout: morton_order(layout.grid)):
        assert torch.allclose(t2v.run(**size), plain, atol=1e-4)


def test_a_mask_from_the_model_means_dense_and_is_said_aloud(t2v, monkeypatch):
    block = t2v.root.blocks[1].attn1
    stock = type(block).forward

    def masked(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
        mask = torch.zeros(1, 1, 1, hidden_states.shape[1]) if self is block else attention_mask
        return stock(self, hidden_states, encoder_hidden_states, mask, rotary_emb, **kwargs)

    monkeypatch.setattr(type(block), "forward", masked)
    with dit_accel.accelerate(t2v.pipe, "agent", **SETTINGS) as handle:
        with pytest.warns(UserWarning, match=r"blocks\.1\.attn1 runs dense"):
            t2v.run(**SIZES["wan"][0])
        report = handle.report()
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(8, 0), (0, 8)]
    assert report.sites[1].kept == 8 and list(report.fallbacks) == ["transformer:blocks.1.attn1"]


def test_a_block_that_a_hook_stands_in_for_counts_nothing(t2v):
    class Predict(dit_accel.BlockHook):
        def around(self, block, state, run, arguments):
            return arguments["args"][0] if block.index == 1 and state.step == 2 else run()

    with dit_accel.accelerate(t2v.pipe, "agent", block_hooks=[Predict()], **SETTINGS) as handle:
        t2v.run(**SIZES["wan"][0], num_inference_steps=4)
        report = handle.report()
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(8, 0), (6, 0)]


class Mean(OperatorAttnProcessor):
    """Everyone gets the mean value, at even steps of the second layer."""

    def at_step(self, setup, site, state):
        return setup.length if site.layer == 1 and state.step % 2 == 0 else None

    def attend(self, query, key, value, setup, *, scale):
        assert setup == value.shape[2]
        return value.mean(2, keepdim=True).expand_as(query)

    def cost(self, setup):
        return 1 / setup

    def settings(self):
        return self.schedule_settings()


def test_a_method_may_compute_some_calls_and_controls_act_around_it(t2v):
    class Double(dit_accel.AttentionControl):
        def before(self, call, query, key, value):
            return query, key, value * 2

        def after(self, call, output):
            return output / 2

    with dit_accel.accelerate(t2v.pipe, Mean(dense_steps=0)) as handle:
        plain = t2v.run()
        report = handle.report()
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(0, 8), (4, 4)]
    assert report.sites[1].kept == pytest.approx(4 + 4 / 12)
    with dit_accel.accelerate(t2v.pipe, Mean(dense_steps=0), controls=[Double()]):
        assert torch.allclose(t2v.run(), plain, atol=1e-5)


def test_nothing_is_read_from_the_device(t2v, monkeypatch):
    reads = []
    with dit_accel.accelerate(t2v.root, "agent", **SETTINGS) as handle, torch.no_grad():
        for step in range(2):
            handle.clock.set_step(step, 9)
            for method in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__") if step else ():
                stock = getattr(torch.Tensor, method)
                monkeypatch.setattr(
                    torch.Tensor, method, lambda *a, m=method, stock=stock: reads.append(m) or stock(*a)
                )
            t2v.root(torch.randn(1, 16, 3, 10, 14), torch.full((1,), 900 - step), t2v.inputs["prompt_embeds"])
        assert handle.report().density < 1 and reads == []


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["wan", "flux", "sd15"])
def test_compiled_models_are_one_graph_for_each_stage(name, model):
    size, counter = sizes_of(name)[0], CompileCounter()
    with dit_accel.accelerate(model.pipe, "agent", **SETTINGS) as handle:
        eager = model.run(**size, num_inference_steps=5)
        expected = handle.report()
        model.root.compile(fullgraph=True, backend=counter)
        handle.reset_report()
        assert torch.equal(model.run(**size, num_inference_steps=5), eager)
        assert handle.report() == expected
        assert counter.frame_count == (2 if name == "sd15" else 1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            model.run(**size, num_inference_steps=5, seed=3)
