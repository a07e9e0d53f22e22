"""All three seams on every family but Wan: nothing changes, all is seen, nothing is left."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel import AttentionMassRecorder, BlockRecorder
from dit_accel.install import BoundProcessor
from dit_accel.kernels.sparse_plan import plan_from_blocks
from dit_accel.plan.radial import RULES, radial_plan
from dit_accel.processors import RadialAttnProcessor, StaticAttnProcessor

SITES = {
    "flux": {"joint": 3},
    "sd3": {"joint": 2},
    "sd35": {"joint": 2, "self": 1},
    "sd15": {"self": 4, "cross": 4},
    "sdxl": {"self": 5, "cross": 5},
    "hunyuan": {"joint": 3},
    "cogvideox": {"joint": 2},
    "cogvideox1.5": {"joint": 2},
}
VIDEO = ("hunyuan", "cogvideox", "cogvideox1.5")
BLOCKS = {
    "flux": ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.1"],
    "sd35": ["transformer_blocks.0", "transformer_blocks.1"],
    "hunyuan": ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"],
    "cogvideox": ["transformer_blocks.0", "transformer_blocks.1"],
    "cogvideox1.5": ["transformer_blocks.0", "transformer_blocks.1"],
}
UNET_BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
SHOWN = (torch.arange(10) < torch.tensor([[7], [4]])).long()  # words of two prompts that are no padding
KINDS = ("self", "joint", "cross")
STEPS = 2


@pytest.fixture(params=SITES)
def name(request):
    return request.param


@pytest.fixture
def model(name, make_any_subject):
    return make_any_subject(name)


def branches_of(name):
    """Flux and HunyuanVideo call their model once for each branch of guidance, the others once for both."""
    if name in ("flux", "hunyuan"):
        return ["cond", "uncond"]
    return ["cond_uncond"] if name in VIDEO else ["call0"]


class Notes(dit_accel.AttentionControl):
    """Notes every call and how many tokens it had."""

    def __init__(self):
        super().__init__(kinds=KINDS)
        self.calls = []

    def record(self, call, query, key, value, output):
        self.calls.append((call, query.shape[2], key.shape[2]))


class Scale(dit_accel.AttentionControl):
    """Multiplies values before, and outputs after."""

    def __init__(self, before=1.0, after=1.0, **selection):
        super().__init__(**selection)
        self.factors = (before, after)

    def before(self, call, query, key, value):
        return query, key, value * self.factors[0]

    def after(self, call, output):
        return output * self.factors[1]


def test_watching_alone_is_bit_equal(name, model):
    stock = model.run()
    recorder, blocks = AttentionMassRecorder(16, kinds=KINDS), BlockRecorder()
    with dit_accel.accelerate(model.pipe, controls=[recorder], block_hooks=[blocks]):
        assert torch.equal(model.run(), stock)
    assert len(recorder.masses) == STEPS * sum(SITES[name].values()) * len(branches_of(name))
    for mass in recorder.masses.values():
        assert torch.allclose(mass.sum(-1), torch.ones(mass.shape[:2]), atol=1e-5)


def test_removal_restores_output_and_objects(name, model):
    def state():
        return (
            dict(model.root.attn_processors),
            {path: sorted(vars(module)) for path, module in model.root.named_modules()},
            (len(model.root._forward_pre_hooks), len(model.root._forward_hooks)),
        )

    stock, before = model.run(), state()
    handle = dit_accel.accelerate(model.pipe, controls=[Scale(2, kinds=KINDS)], block_hooks=[BlockRecorder()])
    bound = [isinstance(processor, BoundProcessor) for processor in model.root.attn_processors.values()]
    assert sum(bound) == sum(SITES[name].values())
    assert not torch.allclose(model.run(), stock)
    handle.remove()
    assert state() == before
    assert torch.equal(model.run(), stock)


def test_second_run_equals_a_fresh_run(model):
    with dit_accel.accelerate(model.pipe, controls=[Scale(2, kinds=KINDS, steps=(1, 2))]) as handle:
        model.run(seed=5, num_inference_steps=3)
        second = model.run()
        assert (handle.clock.state.generation, handle.clock.state.step, handle.clock.state.steps) == (1, 1, 2)
    with dit_accel.accelerate(model.pipe, controls=[Scale(2, kinds=KINDS, steps=(1, 2))]):
        assert torch.equal(model.run(), second)


def test_another_size_starts_one_new_generation(name, model):
    sizes = {"latents": torch.randn(1, 4, 8, 12)} if "latents" in model.inputs else {"height": 8, "width": 20}
    sizes = {"height": 32, "width": 160} if name in VIDEO else sizes
    with dit_accel.accelerate(model.pipe, controls=[notes := Notes()]):
        model.run(num_inference_steps=3)
        model.run(**sizes)
    states = list(dict.fromkeys(call.state for call, *_ in notes.calls))
    calls = len(branches_of(name))
    places = [(state.generation, state.step, state.steps) for state in states[3 * calls :]]
    assert places == [(1, step, 2) for step in range(2) for _ in range(calls)]


def test_a_batch_equals_its_samples(model):
    prompts = {key: torch.randn(2, *part.shape[1:]) for key, part in model.inputs.items() if "embeds" in key}
    prompts |= {key: SHOWN for key in model.inputs if "mask" in key}
    noise = torch.randn(2, *model.run(num_inference_steps=1).shape[1:])
    with dit_accel.accelerate(model.pipe, controls=[Scale(2, kinds=KINDS)]):
        together = model.run(**prompts | {"latents": noise})
        for i in range(2):
            one = {key: part[i : i + 1] for key, part in (prompts | {"latents": noise}).items()}
            assert torch.allclose(model.run(**one)[0], together[i], atol=1e-4)


def test_calls_say_where_and_when_they_are(name, model):
    """Every call has its step and branch, and every layout fits its call."""
    notes = Notes()
    with dit_accel.accelerate(model.pipe, controls=[notes]):
        model.run()
    states = dict.fromkeys(call.state for call, *_ in notes.calls)
    wanted = [(step, STEPS, branch) for step in range(STEPS) for branch in branches_of(name)]
    assert [(state.step, state.steps, state.branch) for state in states] == wanted
    for kind, count in SITES[name].items():
        layers = [(call.site.layer, call.site.layers) for call, *_ in notes.calls if call.site.kind == kind]
        assert layers == [(i, count) for i in range(count)] * len(wanted)  # numbered in execution order
    for call, queries, keys in notes.calls:
        assert queries == call.layout.length
        assert keys == (10 if call.site.kind == "cross" else queries)


@pytest.mark.parametrize("kind", KINDS)
def test_before_and_after_reach_the_model(name, model, kind):
    if kind not in SITES[name]:
        found = ", ".join(f"{count} {kind}" for kind, count in SITES[name].items())
        with pytest.raises(ValueError, match=f"Scale acts nowhere: {type(model.root).__name__} has {found}"):
            dit_accel.accelerate(model.pipe, controls=[Scale(2, kinds=[kind])])
        return
    stock = model.run(num_inference_steps=1)
    for control, same in ((Scale(2, 0.5, kinds=[kind]), True), (Scale(2, kinds=[kind]), False)):
        with dit_accel.accelerate(model.pipe, controls=[control]):
            assert torch.allclose(model.run(num_inference_steps=1), stock, atol=1e-5) is same


def test_a_layer_that_is_not_there_is_refused_and_nothing_is_left(name, model):
    absent = AttentionMassRecorder(kinds=list(SITES[name]), layers=[99])
    with pytest.raises(ValueError, match="AttentionMassRecorder acts nowhere"):
        dit_accel.accelerate(model.pipe, controls=[Notes(), absent])
    assert not any(isinstance(processor, BoundProcessor) for processor in model.root.attn_processors.values())
    assert dit_accel.acceleration_of(model.pipe) is None


class SkipLast(dit_accel.BlockHook):
    """Notes the blocks, and lets the last one give nothing."""

    def __init__(self):
        self.paths = []

    def around(self, block, state, run, arguments):
        self.paths.append(block.path)
        output = run()
        if block.index < block.count - 1:
            return output
        parts = output if isinstance(output, tuple) else (output,)
        zeros = tuple(None if part is None else torch.zeros_like(part) for part in parts)
        return zeros if isinstance(output, tuple) else zeros[0]


def test_block_hooks_run_in_execution_order_and_can_change_a_block(name, model):
    stock, hook = model.run(num_inference_steps=1), SkipLast()
    with dit_accel.accelerate(model.pipe, block_hooks=[hook]):
        assert not torch.allclose(model.run(num_inference_steps=1), stock)
    assert hook.paths == BLOCKS.get(name, UNET_BLOCKS) * len(branches_of(name))


@pytest.mark.parametrize("compiled", ["sd35", "sd15"])
def test_compiled_models_are_one_graph_with_a_control_and_one_without(compiled, make_image_subject):
    torch._dynamo.reset()
    subject, counter = make_image_subject(compiled), CompileCounter()
    stock = subject.run()
    with dit_accel.accelerate(subject.pipe, controls=[Scale(2, kinds=KINDS, steps=(1, 2))]):
        eager = subject.run()
        subject.root.compile(fullgraph=True, backend=counter)
        assert torch.allclose(subject.run(), eager, atol=1e-6)
        assert counter.frame_count == 2
    torch._dynamo.reset()
    assert torch.equal(subject.run(), stock) and not torch.allclose(eager, stock)


class Window(StaticAttnProcessor):
    """A block of queries sees the blocks beside it; with a wide window, everything."""

    block = 64

    def __init__(self, width):
        super().__init__(dense_steps=0)
        self.width, self.layouts = width, []

    def build_plan(self, layout, device):
        self.layouts.append(layout)
        index = torch.arange(-(-layout.length // self.block), device=device)
        keep = (index[:, None] - index).abs() <= self.width
        return plan_from_blocks(
            keep, q_len=layout.length, kv_len=layout.length, block_q=self.block, block_kv=self.block
        )

    def settings(self):
        return {"width": self.width}


def large_size(name, model):
    """At which every site has several blocks of 64 tokens."""
    if name in VIDEO:
        return {"height": 96, "width": 128}
    return {"latents": torch.randn(1, 4, 17, 23)} if "latents" in model.inputs else {"height": 28, "width": 32}


def test_sparse_methods_get_the_layout_of_each_site(name, model):
    large = large_size(name, model)
    stock = model.run(**large)
    for width, same in ((99, True), (0, False)):
        recipe = Window(width)
        with dit_accel.accelerate(model.pipe, recipe) as handle:
            assert torch.allclose(model.run(**large), stock, atol=1e-4) is same
            report = handle.report()
        assert report.fallbacks == {} and all(site.dense_calls == 0 for site in report.sites)
        kinds = [site.kind for site in report.sites]
        assert {kind: kinds.count(kind) for kind in kinds} == {k: n for k, n in SITES[name].items() if k != "cross"}
        assert (
            len(recipe.layouts) == len(set(recipe.layouts)) == (1 if name in ("sd3", "flux", *VIDEO) else 2)
        )  # each once


@pytest.mark.parametrize("name", [name for name in SITES if name not in VIDEO])
def test_methods_that_live_on_frames_refuse_images(model):
    assert {radial_plan((1, 16, 16), block=64, rule=rule).stats.density for rule in RULES} == {1}  # why
    message = rf"saves nothing in {type(model.root).__name__}.*use it with a video model"
    for install in (
        lambda: dit_accel.accelerate(model.pipe, "radial"),
        lambda: model.pipe.set_attn_processor(RadialAttnProcessor()),
        lambda: model.root.set_attn_processor(RadialAttnProcessor()),
    ):
        with pytest.raises(ValueError, match=message):
            install()
        assert not any(isinstance(processor, BoundProcessor) for processor in model.root.attn_processors.values())


LITTLE = {
    "neighborhood": {"window": 0.3},
    "block_routing": {"amount": 0.3},
    "adaspa": {"density": 0.3},
    "vmoba": {"amount": 0.3},
    "compensated": {"density": 0.3},
}


@pytest.mark.parametrize("method", LITTLE)
def test_every_other_method_runs(name, model, method):
    large = large_size(name, model)
    settings = {"dense_steps": 0, "dense_layers": 0, "block": 64} | LITTLE[method]
    dense = model.run(**large)
    with dit_accel.accelerate(model.pipe, method, **settings) as handle:
        found = model.run(**large)
        report = handle.report()
    assert report.fallbacks == {} and all(site.sparse_calls > 0 for site in report.sites)
    assert report.density < 1 and torch.isfinite(found).all() and not torch.equal(found, dense)
    assert torch.equal(model.run(**large), dense)
