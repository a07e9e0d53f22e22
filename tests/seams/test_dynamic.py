"""Plans found at run time: when they are searched for, how long they live, what they count, and how they compile."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.kernels.search.plan import count_density, dynamic_plan
from dit_accel.kernels.token_order import pixel_order
from dit_accel.processors import BlockRoutingAttnProcessor, DynamicAttnProcessor, SparseAttnProcessor

ODD = {"height": 240, "width": 208, "num_frames": 13}  # 4 x 15 x 13 tokens
IMAGE = {"height": 30, "width": 34}  # 15 x 17 tokens and 10 of text
ROUTING = {"block": 64, "amount": 0.3, "dense_steps": 0, "dense_layers": 0}


class Watched(BlockRoutingAttnProcessor):
    """Keeps every plan it found."""

    def __init__(self, **settings):
        super().__init__(**ROUTING | settings)
        self.plans = []

    def find_plan(self, query, key, setup, *, scale):
        plan = super().find_plan(query, key, setup, scale=scale)
        self.plans.append(plan)
        return plan


class Steps(dit_accel.AttentionControl):
    """Notes where every call is, and how many plans had been found by its end."""

    def __init__(self, processor):
        super().__init__(kinds=("self", "joint"))
        self.processor, self.searched, self._count = processor, [], 0

    def record(self, call, query, key, value, output):
        if len(self.processor.plans) > self._count:
            self.searched.append((call.state.step, call.state.branch, call.site.layer))
        self._count = len(self.processor.plans)


@pytest.fixture(params=["wan", "flux"])
def model(request, make_image_subject, t2v):
    """A pipeline of each kind and a size at which blocks are left out."""
    if request.param == "wan":
        return t2v, ODD
    return make_image_subject("flux"), IMAGE


def sites_of(handle):
    return [site for installed in handle._installed for site in installed.sites.values()]


def test_a_site_searches_at_its_steps_and_follows_its_plan_between(model):
    subject, size = model
    processor = Watched(search_every=3, dense_steps=2, dense_layers=1)
    with dit_accel.accelerate(subject.pipe, processor, controls=[steps := Steps(processor)]) as handle:
        subject.run(**size, num_inference_steps=8)
        report = handle.report()
    layers = range(1, len(report.sites))
    wanted = [(step, branch, layer) for step in (2, 5) for branch in ("cond", "uncond") for layer in layers]
    assert steps.searched == wanted
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(0, 16)] + [(12, 4)] * len(layers)


class Oracle(dit_accel.AttentionControl):
    """Searches as the method does at its steps, and wants the output of dense attention under the plan's mask."""

    def __init__(self, processor, every):
        super().__init__(kinds=("self", "joint"))
        self.processor, self.every, self.masks, self.worst = processor, every, {}, 0.0

    def before(self, call, query, key, value):
        where = (call.site.path, call.state.branch)
        if call.state.step % self.every == 0:
            setup = self.processor.set_up(call.site, call.layout, query.device)
            self.masks[where] = self.processor.find_plan(query, key, setup, scale=None).element_mask()
        scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~self.masks[where], -torch.inf)
        self.output = scores.softmax(-1) @ value
        return query, key, value

    def after(self, call, output):
        self.worst = max(self.worst, float((output - self.output).abs().max()))
        return output


@pytest.mark.parametrize("options", [{}, {"select": "top_p", "score": "mass"}, {"head_shared": True}])
def test_output_is_attention_under_the_plan_that_was_kept(model, options):
    subject, size = model
    processor = BlockRoutingAttnProcessor(**ROUTING | options, search_every=2)
    with dit_accel.accelerate(subject.pipe, processor, controls=[oracle := Oracle(processor, every=2)]):
        subject.run(**size, num_inference_steps=3)
    assert oracle.worst < 1e-5
    pairs = [(mask, oracle.masks[path, "uncond"]) for (path, branch), mask in oracle.masks.items() if branch == "cond"]
    assert not all(torch.equal(cond, uncond) for cond, uncond in pairs)  # each branch has its own
    assert not any(cond.all() for cond, _ in pairs)


def test_second_run_equals_a_fresh_run(model):
    subject, size = model
    settings = ROUTING | {"search_every": 3}
    subject.pipe.set_attn_processor(BlockRoutingAttnProcessor(**settings))
    subject.run(seed=5, num_inference_steps=4)
    subject.run(seed=6, **size, num_inference_steps=4)
    second = subject.run(**size, num_inference_steps=4)
    subject.pipe.set_attn_processor(BlockRoutingAttnProcessor(**settings))
    assert torch.equal(subject.run(**size, num_inference_steps=4), second)


def test_a_batch_equals_its_samples(model):
    subject, size = model
    shape = subject.run(**size, num_inference_steps=1).shape[1:]
    prompts = {name: torch.randn(2, *part.shape[1:]) for name, part in subject.inputs.items() if "embeds" in name}
    noise = torch.randn(2, *shape)
    with dit_accel.accelerate(subject.pipe, "block_routing", **ROUTING, search_every=2) as handle:
        together = subject.run(**size, num_inference_steps=3, latents=noise, **prompts)
        assert handle.report().density < 0.7
        for i in range(2):
            one = {name: part[i : i + 1] for name, part in prompts.items()}
            alone = subject.run(**size, num_inference_steps=3, latents=noise[i : i + 1], **one)
            assert torch.allclose(alone[0], together[i], atol=1e-4)


def test_removal_is_bit_equal_and_keeps_no_plan(model):
    subject, size = model
    stock = subject.run(**size)
    handle = dit_accel.accelerate(subject.pipe, "block_routing", **ROUTING, search_every=99)
    handle.clock.set_step(0, 9)  # so that plans are still wanted when the handle is removed
    changed = subject.run(**size)
    sites = [site for site in sites_of(handle) if site.info.kind != "cross"]
    assert not torch.allclose(changed, stock) and all(site._kept for site in sites)
    handle.remove()
    assert not any(site._kept for site in sites)
    assert torch.equal(subject.run(**size), stock)


def test_plans_are_let_go_after_the_last_step(t2v):
    held = []

    class Held(dit_accel.AttentionControl):
        def record(self, call, query, key, value, output):
            held.append((call.state.step, sum(len(site._kept) for site in sites_of(handle))))

    with dit_accel.accelerate(t2v.pipe, "block_routing", controls=[Held()], **ROUTING, search_every=9) as handle:
        t2v.run(**ODD, num_inference_steps=3)
        assert (1, 4) in held  # two layers, two branches
        assert not any(site._kept for site in sites_of(handle))


def call_wan(handle, subject, step, *, frames=4, batch=1, seed=0, branch="cond"):
    """One call of the bare transformer, on 15 x 13 tokens for each frame."""
    generator = torch.Generator().manual_seed(seed)
    handle.clock.set_step(step, 9, branch)
    latents = torch.randn(batch, 16, frames, 30, 26, generator=generator)
    text = subject.inputs["prompt_embeds"].expand(batch, -1, -1)
    return subject.root(latents, torch.full((batch,), 900 - step), text, return_dict=False)[0]


@pytest.mark.parametrize(
    ("second", "searches"),
    [
        ({"step": 1}, 0),
        ({"step": 1, "branch": "uncond"}, 2),  # each branch has plans of its own
        ({"step": 1, "frames": 3}, 2),  # another layout
        ({"step": 1, "batch": 2}, 2),  # lists for each batch item are of no use to two
        ({"step": 0}, 2),  # another generation
    ],
)
def test_what_makes_a_kept_plan_useless(t2v, second, searches):
    processor = Watched(search_every=9)
    with dit_accel.accelerate(t2v.root, processor) as handle:
        call_wan(handle, t2v, 0)
        assert len(processor.plans) == 2  # one for each layer
        output = call_wan(handle, t2v, **second, seed=1)
        assert len(processor.plans) == 2 + searches
    with dit_accel.accelerate(t2v.root, Watched(search_every=9)) as handle:
        assert torch.equal(output, call_wan(handle, t2v, **second, seed=1)) is bool(searches)


def test_report_counts_what_was_kept_at_each_site(model):
    subject, size = model
    processor = Watched(select="top_p", amount=0.7, dense_steps=1)
    with dit_accel.accelerate(subject.pipe, processor) as handle:
        subject.run(**size, num_inference_steps=3)
        assert all(math.isnan(plan.density) for plan in processor.plans)
        report, again = handle.report(), handle.report()
        handle.reset_report()
        assert handle.report().density == 1 and handle.report().plan_density is None
    layers = len(report.sites)
    exact = [count_density(plan).density for plan in processor.plans]  # 2 steps of 2 branches, layer by layer
    for layer, site in enumerate(report.sites):
        assert site.kept == pytest.approx(2 + sum(exact[layer::layers]), rel=1e-5)  # and 2 dense calls
        assert (site.sparse_calls, site.dense_calls) == (4, 2)
    assert report.plan_density == pytest.approx(sum(exact) / len(exact), rel=1e-5)
    assert report.density == pytest.approx((2 * layers + sum(exact)) / (6 * layers), rel=1e-5)
    assert max(exact) < 1 and again == report
    assert "kept pairs" in report.summary() and "nan" not in report.summary()


def test_nothing_is_read_from_the_device_before_the_report(t2v, monkeypatch):
    """A call of the model alone; schedulers and the clock of pipelines look at timesteps."""
    reads, settings = [], ROUTING | {"select": "top_p", "backend": "reference"}  # gather reads lists on the CPU
    with dit_accel.accelerate(t2v.root, "block_routing", **settings) as handle, torch.no_grad():
        call_wan(handle, t2v, 0)
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            stock = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, stock=stock: reads.append(name) or stock(*a))
        call_wan(handle, t2v, 1)
        assert reads == []
        assert handle.report().density < 1
        assert set(reads) == {"__float__"}
        monkeypatch.undo()


def test_a_mask_from_the_model_means_dense_and_is_said_aloud(t2v, monkeypatch):
    block = t2v.root.blocks[1].attn1
    stock = type(block).forward

    def masked(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
        mask = torch.zeros(1, 1, 1, hidden_states.shape[1]) if self is block else attention_mask
        return stock(self, hidden_states, encoder_hidden_states, mask, rotary_emb, **kwargs)

    monkeypatch.setattr(type(block), "forward", masked)
    with dit_accel.accelerate(t2v.pipe, "block_routing", **ROUTING) as handle:
        with pytest.warns(UserWarning, match=r"blocks\.1\.attn1 runs dense"):
            t2v.run(**ODD)
        report = handle.report()
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(8, 0), (0, 8)]
    assert report.sites[1].kept == 8 and list(report.fallbacks) == ["transformer:blocks.1.attn1"]


def test_a_block_that_a_hook_stands_in_for_counts_nothing(t2v):
    class Predict(dit_accel.BlockHook):
        def around(self, block, state, run, arguments):
            return arguments["args"][0] if block.index == 1 and state.step == 2 else run()

    with dit_accel.accelerate(t2v.pipe, "block_routing", block_hooks=[Predict()], **ROUTING) as handle:
        t2v.run(**ODD, num_inference_steps=4)
        report = handle.report()
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(8, 0), (6, 0)]


class Reversed(DynamicAttnProcessor):
    """Cuts blocks from the sequence read backwards; layers differ in how much they keep."""

    block = 64

    def __init__(self, amounts):
        super().__init__(dense_steps=0)
        self.amounts, self.setups = amounts, []

    def renews(self, site, state):
        return state.step % 2 == site.layer % 2  # the layers take turns

    def set_up(self, site, layout, device):
        self.setups.append((site.layer, layout))
        return torch.arange(layout.length - 1, -1, -1, device=device), self.amounts[site.layer]

    def find_plan(self, query, key, setup, *, scale):
        order, amount = setup
        q, k = (x.index_select(2, order).transpose(1, 2) for x in (query, key))
        plan = dynamic_plan(q, k, block_q=self.block, block_kv=self.block, amount=amount, scale=scale)
        return replace(plan, order=order)

    def settings(self):
        return {"amounts": self.amounts}


def test_a_method_may_have_a_token_order_and_tell_layers_apart(t2v):
    stock = t2v.run(**ODD)
    for amounts, same in (((1.0, 1.0), True), ((1.0, 0.3), False)):
        processor = Reversed(amounts)
        with dit_accel.accelerate(t2v.pipe, processor) as handle:
            assert torch.allclose(t2v.run(**ODD), stock, atol=1e-4) is same
            report = handle.report()
        layout = dit_accel.clock.TokenLayout.video_only((4, 15, 13))
        assert processor.setups == [(0, layout), (1, layout)]  # once per site, not per step
        assert [site.kept / site.sparse_calls < 0.5 for site in report.sites] == [amount < 1 for amount in amounts]


def test_set_ups_of_a_few_layouts_are_kept(t2v):
    processor = Reversed((0.5, 0.5))
    with dit_accel.accelerate(t2v.root, processor) as handle, torch.no_grad():
        for frames in (1, 2, 3, 4, 5, 2, 1):
            call_wan(handle, t2v, 0, frames=frames)
        assert {len(site._set_ups) for site in sites_of(handle) if site.info.kind == "self"} == {4}
    assert [layout.grid[0] for layer, layout in processor.setups if layer == 0] == [1, 2, 3, 4, 5, 1]


def test_methods_that_are_neither_kind_are_refused(t2v):
    class Neither(SparseAttnProcessor):
        def settings(self):
            return {}

    with pytest.raises(ValueError, match="StaticAttnProcessor or DynamicAttnProcessor; got Neither"):
        dit_accel.accelerate(t2v.pipe, Neither())


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"search_every": 3}, 2),
        ({"score": "mass", "select": "top_p", "amount": 0.7, "search_every": 1}, 1),
        # Dense, search and reuse are three computations; none of them could be part of another.
        ({"search_every": 3, "dense_steps": 2}, 3),
    ],
)
def test_searching_and_following_are_one_graph_each(model, options, graphs):
    subject, size = model
    counter = CompileCounter()
    with dit_accel.accelerate(subject.pipe, "block_routing", **ROUTING | options) as handle:
        eager = subject.run(**size, num_inference_steps=10)
        expected = handle.report()
        subject.root.compile(fullgraph=True, backend=counter)
        handle.reset_report()
        assert torch.equal(subject.run(**size, num_inference_steps=10), eager)
        assert handle.report() == expected
        assert counter.frame_count == graphs
        with torch._dynamo.config.patch(error_on_recompile=True):
            subject.run(**size, num_inference_steps=10, seed=3)


@pytest.mark.usefixtures("fresh_dynamo")
def test_static_plans_compile_to_one_graph_over_ten_steps(t2v):
    counter = CompileCounter()
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=0):
        eager = t2v.run(**ODD, num_inference_steps=10)
        t2v.root.compile(fullgraph=True, backend=counter)
        assert torch.equal(t2v.run(**ODD, num_inference_steps=10), eager)
        assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_blocks_compiled_one_by_one_share_their_graphs(t2v):
    counter = CompileCounter()
    with dit_accel.accelerate(t2v.pipe, "block_routing", **ROUTING, search_every=3):
        eager = t2v.run(**ODD, num_inference_steps=10)
        t2v.root.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert torch.equal(t2v.run(**ODD, num_inference_steps=10), eager)
        assert counter.frame_count == 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_plans_found_by_compiled_code_own_their_lists(t2v):
    """CUDA graphs write their next results over the last."""
    with dit_accel.accelerate(t2v.root, "block_routing", **ROUTING, search_every=9) as handle:
        t2v.root.compile(fullgraph=True, backend="eager")
        found = []
        for site in sites_of(handle):
            settle = site.settle
            site.settle = lambda state, site=site, settle=settle: (found.append(site.found), settle(state))[1]
        call_wan(handle, t2v, 0)
        kept = [site._kept["cond"].plan for site in sites_of(handle) if site._kept]
    found = [plan for plan in found if plan is not None]
    assert len(kept) == len(found) == 2
    for mine, theirs in zip(kept, found, strict=True):
        assert torch.equal(mine.indices, theirs.indices) and torch.equal(mine.counts, theirs.counts)
        assert mine.indices.data_ptr() != theirs.indices.data_ptr() and mine.full_counts is mine.counts


METHODS = ["neighborhood", "block_routing", "compensated", "vmoba", "agent", "grid"]
BY_PIXEL = {"token_order": lambda layout: pixel_order(layout.grid)}


@pytest.mark.parametrize(
    ("method", "options"),
    [*((method, {}) for method in METHODS), ("neighborhood", BY_PIXEL), ("block_routing", BY_PIXEL)],
)
def test_what_is_set_up_under_inference_mode_serves_training_later(t2v, method, options):
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, 64),
        "return_dict": False,
    }
    with dit_accel.accelerate(t2v.pipe, method, dense_steps=0, dense_layers=0, **options) as accelerated:
        with torch.inference_mode():
            accelerated.clock.set_step(0, 4)
            t2v.root(**inputs)
        accelerated.clock.set_step(0, 4)
        t2v.root(**inputs)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in t2v.root.blocks[0].attn1.to_q.parameters())
    t2v.root.zero_grad()
