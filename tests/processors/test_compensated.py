"""Compensated attention against Sol-Attn's formulas, at single sites and in whole models."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.install import TokenPermutation
from dit_accel.install.site import Site
from dit_accel.kernels.token_order import inverse_order, morton_order, pixel_order
from dit_accel.layout import TokenLayout
from dit_accel.processors import (
    AdaSpaAttnProcessor,
    BlockRoutingAttnProcessor,
    CompensatedAttnProcessor,
    DynamicAttnProcessor,
    VMoBAAttnProcessor,
    processor_by_name,
)

from ..seams.conftest import Subject, build_image_subject, build_subject
from .compensated_oracle import every_head, every_output, sequence

INFO = SiteInfo("blocks.1.attn1", "self", 1, 3, "transformer")
CPU = torch.device("cpu")
GRID = (5, 7, 9)  # odd: 315 tokens, the last block is short
VIDEO = 5 * 7 * 9
ALWAYS: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0}
SIZES: dict[str, dict[str, int]] = {
    "wan": {"height": 240, "width": 208, "num_frames": 13},  # 4 x 15 x 13 tokens, no text
    "flux": {"height": 30, "width": 34},  # 10 of text, then 15 x 17
    "sd3": {"height": 32, "width": 30},  # 16 x 15, then 10 of text
}


def layout_of(grid: tuple[int, int, int], place: str, text: int) -> TokenLayout:
    video = math.prod(grid)
    if place == "absent":
        return TokenLayout.video_only(grid)
    if place == "before":
        return TokenLayout(grid, (text, text + video), text=(0, text))
    return TokenLayout(grid, (0, video), text=(video, video + text))


def smooth(layout: TokenLayout, seed: int, *, batch: int = 1, heads: int = 2, width: int = 16) -> list[Tensor]:
    """Queries, keys and values that are waves through the video; text tokens are somewhere in it."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(layout.length, 3, generator=generator)
    axes = [torch.linspace(0, 1, side) for side in layout.grid]
    places[slice(*layout.visual)] = torch.cartesian_prod(*axes)
    waves = torch.randn(3, batch, heads, 3, width, generator=generator) * 3
    shifts = torch.rand(3, batch, heads, 1, width, generator=generator) * 6
    return list(1.5 * torch.sin(places @ waves + shifts))


def attend(processor: DynamicAttnProcessor, layout: TokenLayout, qkv: list[Tensor], scale: float | None = None) -> Any:
    """One call at a site by itself; returns its output and the plan that it found."""
    site = Site(INFO)
    site.layout = layout
    site.prepare(StepState(0, 9, 20, "cond", "transformer", 0, layout, None), search=processor, device=CPU)
    out = site.attend(*qkv, scale=scale, plain=True, stock=lambda q, k, v: pytest.fail("ran dense"))
    return out, site.found


def random_case(seed: int) -> tuple[CompensatedAttnProcessor, TokenLayout, list[Tensor], float | None]:
    choose = random.Random(seed)
    grid = (choose.randint(1, 5), choose.randint(3, 11), choose.randint(3, 11))
    layout = layout_of(grid, choose.choice(["absent", "before", "after"]), choose.randint(1, 70))
    rule: dict[str, Any] = choose.choice(
        [
            {"tau": choose.uniform(-0.5, 2.0), "variance": choose.choice(["diag", "exact"])},
            {"density": choose.uniform(0.05, 1.0)},
        ]
    )
    shared: dict[str, Any] = {"block": choose.choice([64, 64, 128]), "morton": choose.random() < 0.5}
    tensors = smooth(
        layout, seed, batch=choose.randint(1, 3), heads=choose.randint(1, 3), width=choose.choice([8, 20])
    )
    return CompensatedAttnProcessor(**rule, **shared), layout, tensors, choose.choice([None, 0.1])


@pytest.mark.parametrize("seed", range(60))
def test_random_configurations_follow_the_formula(seed: int) -> None:
    processor, layout, qkv, scale = random_case(seed)
    rows = every_head(processor, layout, qkv[0], qkv[1], scale)
    out, plan = attend(processor, layout, qkv, scale)
    found = [[[set(row.nonzero().flatten().tolist()) for row in head] for head in item] for item in plan.to_bool()]
    assert found == rows
    assert (out - every_output(processor, layout, rows, (qkv[0], qkv[1], qkv[2]), scale)).abs().max() < 1e-5


class Oracle(dit_accel.AttentionControl):
    """Searches by the formula at the method's steps, and wants the formula's output at every call."""

    def __init__(self, processor: CompensatedAttnProcessor) -> None:
        super().__init__(kinds=("self", "joint"))
        self.processor, self.worst, self.gain = processor, 0.0, 0.0
        self.rows: dict[tuple[str, str], Any] = {}

    def before(self, call: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        where = (call.site.path, call.state.branch)
        if call.state.step % self.processor.search_every == 0:
            self.rows[where] = every_head(self.processor, call.layout, query, key)
        self.wanted = every_output(self.processor, call.layout, self.rows[where], (query, key, value))
        self.dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return query, key, value

    def after(self, call: Any, output: Tensor) -> Tensor:
        self.worst = max(self.worst, float((output - self.wanted).abs().max()))
        self.gain = max(self.gain, float((output - self.dense).abs().max()))
        return output


def subject_of(name: str, make_tiny_wan: Any) -> Subject:
    return build_subject(make_tiny_wan, "t2v") if name == "wan" else build_image_subject(name)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "options", [{"tau": 0.5}, {"variance": "exact", "morton": True}, {"density": 0.6, "search_every": 2}], ids=str
)
def test_every_call_of_a_model_follows_the_formula(name: str, options: dict[str, Any], make_tiny_wan: Any) -> None:
    """A plan that is kept meets the means of later calls."""
    subject = subject_of(name, make_tiny_wan)
    processor = CompensatedAttnProcessor(**options, **ALWAYS)
    with dit_accel.accelerate(subject.pipe, processor, controls=[oracle := Oracle(processor)]) as handle:
        subject.run(**SIZES[name], num_inference_steps=2)
        report = handle.report()
    assert oracle.worst < 1e-5 < oracle.gain
    assert report.density < 1 and not report.fallbacks and all(site.dense_calls == 0 for site in report.sites)


@pytest.mark.parametrize("place", ["absent", "before", "after"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (CompensatedAttnProcessor, {}),
        (CompensatedAttnProcessor, {"density": 0.4, "morton": True}),
        (BlockRoutingAttnProcessor, {"block": 64, "amount": 0.3}),
        (BlockRoutingAttnProcessor, {"block": 64, "score": "mass", "select": "top_p", "amount": 0.6}),
    ],
)
def test_means_are_nearer_to_dense_than_nothing(method: Any, options: dict[str, Any], place: str) -> None:
    layout = layout_of(GRID, place, 37)
    q, k, v = smooth(layout, 3)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with_means, plan = attend(method(**options, compensate=True), layout, [q, k, v])
    without, same = attend(method(**options, compensate=False), layout, [q, k, v])
    assert torch.equal(plan.to_bool(), same.to_bool()) and not plan.to_bool().all()
    assert (with_means - dense).square().mean() < 0.5 * (without - dense).square().mean()
    text = layout.text or (0, 0)
    torch.testing.assert_close(with_means[:, :, slice(*text)], dense[:, :, slice(*text)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["absent", "before", "after"])
@pytest.mark.parametrize(
    ("method", "options"),
    [(AdaSpaAttnProcessor, {"density": 0.4}), (VMoBAAttnProcessor, {"chunk": 1, "select": "top_k", "amount": 2})],
)
def test_other_methods_take_the_switch(method: Any, options: dict[str, Any], place: str) -> None:
    """The second step follows the plan of the first, which AdaSpa runs dense."""
    layout = layout_of(GRID, place, 37)
    q, k, v = smooth(layout, 3)
    dense = torch.nn.functional.scaled_dot_product_attention

    def second(compensate: bool) -> Tensor:
        processor, site = method(**options, compensate=compensate), Site(INFO)
        site.layout = layout
        for step in (9, 10):
            state = StepState(0, step, 20, "cond", "transformer", 0, layout, None)
            site.prepare(state, search=processor, device=CPU)
            out = site.attend(q, k, v, scale=None, plain=True, stock=dense)
            density = site.settle(state)
        assert density is not None and float(density) < 0.9
        return out

    exact = dense(q, k, v)
    with_means, without = ((second(switch) - exact).square().mean() for switch in (True, False))
    assert with_means < 0.7 * without


@pytest.mark.parametrize("rule", [{"density": 1.0}, {"density": 1}, {"tau": -1e9}], ids=str)
@pytest.mark.parametrize("morton", [False, True])
def test_everything_exact_is_dense_attention(rule: dict[str, Any], morton: bool) -> None:
    layout = layout_of(GRID, "after", 37)
    q, k, v = smooth(layout, 4)
    out, plan = attend(CompensatedAttnProcessor(**rule, morton=morton), layout, [q, k, v])
    assert plan.to_bool().all()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def test_a_high_threshold_leaves_neighbors_and_text() -> None:
    layout = layout_of(GRID, "after", 6)  # 315 + 6 tokens: text in blocks 4 and 5
    _, plan = attend(CompensatedAttnProcessor(tau=1e9), layout, smooth(layout, 5))
    place = torch.arange(6)
    wanted = ((place[:, None] - place).abs() <= 1) | (place >= 4) | (place >= 4)[:, None]
    assert torch.equal(plan.to_bool(), wanted.expand(1, 2, 6, 6))


@pytest.mark.parametrize(("density", "blocks"), [(1e-9, 1), (0.2, 1), (0.21, 2), (0.8, 4)])
def test_a_density_is_that_part_of_every_row(density: float, blocks: int) -> None:
    layout = TokenLayout.video_only(GRID)  # 5 blocks
    _, plan = attend(CompensatedAttnProcessor(density=density), layout, smooth(layout, 5))
    assert (plan.to_bool().sum(-1) == blocks).all()


@pytest.fixture
def wan(make_tiny_wan: Any) -> Subject:
    return build_subject(make_tiny_wan, "t2v")


@pytest.mark.parametrize("name", SIZES)
def test_a_second_run_equals_a_fresh_one(name: str, make_tiny_wan: Any) -> None:
    subject = subject_of(name, make_tiny_wan)
    settings = {"morton": True, "search_every": 3} | ALWAYS
    subject.pipe.set_attn_processor(CompensatedAttnProcessor(**settings))
    subject.run(seed=5, num_inference_steps=4)  # another resolution
    subject.run(seed=6, **SIZES[name], num_inference_steps=4)
    second = subject.run(**SIZES[name], num_inference_steps=4)
    subject.pipe.set_attn_processor(CompensatedAttnProcessor(**settings))
    assert torch.equal(subject.run(**SIZES[name], num_inference_steps=4), second)


@pytest.mark.parametrize("name", SIZES)
def test_removal_is_bit_equal(name: str, make_tiny_wan: Any) -> None:
    subject = subject_of(name, make_tiny_wan)
    stock = subject.run(**SIZES[name])
    handle = dit_accel.accelerate(subject.pipe, "compensated", **ALWAYS)
    assert not torch.equal(subject.run(**SIZES[name]), stock)
    handle.remove()
    assert torch.equal(subject.run(**SIZES[name]), stock)


@pytest.mark.parametrize("name", SIZES)
def test_a_batch_equals_its_samples(name: str, make_tiny_wan: Any) -> None:
    subject, size = subject_of(name, make_tiny_wan), SIZES[name]
    shape = subject.run(**size, num_inference_steps=1).shape[1:]
    prompts: dict[str, Any] = {
        part: torch.randn(2, *x.shape[1:]) for part, x in subject.inputs.items() if "embeds" in part
    }
    noise = torch.randn(2, *shape)
    with dit_accel.accelerate(subject.pipe, "compensated", search_every=2, **ALWAYS) as handle:
        together = subject.run(**size, num_inference_steps=3, latents=noise, **prompts)
        assert handle.report().density < 1
        for i in range(2):
            one: dict[str, Any] = {part: x[i : i + 1] for part, x in prompts.items()}
            alone = subject.run(**size, num_inference_steps=3, latents=noise[i : i + 1], **one)
            assert torch.allclose(alone[0], together[i], atol=1e-4)


@pytest.mark.parametrize(
    ("order", "warned"), [(morton_order, False), (pixel_order, True)], ids=["morton", "another order"]
)
def test_permuted_once_or_in_every_call_is_the_same(wan: Subject, order: Any, warned: bool) -> None:
    processor = CompensatedAttnProcessor(tau=0.5, morton=True, search_every=2, **ALWAYS)
    with dit_accel.accelerate(wan.pipe, processor):
        each_call = wan.run(**SIZES["wan"])
    hook = TokenPermutation(lambda layout: order(layout.grid))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with dit_accel.accelerate(wan.pipe, processor, block_hooks=[hook]) as handle:
            once = wan.run(**SIZES["wan"])
            assert handle.report().density < 1
    torch.testing.assert_close(once, each_call, rtol=1e-4, atol=1e-4)
    assert any("permutes the tokens of every call again" in str(warning.message) for warning in caught) == warned


def test_tokens_that_come_in_morton_order_are_left_alone() -> None:
    layout = TokenLayout.video_only(GRID)
    order = morton_order(GRID)
    inside = TokenLayout(GRID, (0, VIDEO), order=order)
    processor, qkv = CompensatedAttnProcessor(morton=True), smooth(layout, 6)
    out, plan = attend(processor, layout, qkv)
    permuted, bare = attend(processor, inside, [x[:, :, order] for x in qkv])
    assert bare.order is None and plan.order.tolist() == sequence(layout, True)
    torch.testing.assert_close(permuted[:, :, inverse_order(order)], out, rtol=1e-6, atol=1e-6)


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("method", "options", "graphs"),
    [
        ("compensated", {"tau": 0.5}, 1),
        ("compensated", {"search_every": 3, "morton": True}, 2),
        ("block_routing", {"block": 64, "amount": 0.3, "search_every": 3, "compensate": True}, 2),
    ],
)
def test_searching_and_following_compile_to_one_graph_each(
    wan: Subject, method: str, options: dict[str, Any], graphs: int
) -> None:
    counter = CompileCounter()
    with dit_accel.accelerate(wan.pipe, method, **options, **ALWAYS) as handle:
        eager = wan.run(**SIZES["wan"], num_inference_steps=4)
        expected = handle.report()
        wan.root.compile(fullgraph=True, backend=counter)
        handle.reset_report()
        torch.testing.assert_close(wan.run(**SIZES["wan"], num_inference_steps=4), eager, rtol=1e-4, atol=1e-4)
        assert handle.report() == expected
        assert counter.frame_count == graphs
        with torch._dynamo.config.patch(error_on_recompile=True):
            wan.run(**SIZES["wan"], num_inference_steps=4, seed=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": math.nan}, "standard deviations.*nan"),
        ({"tau": math.inf}, "standard deviations.*inf"),
        ({"tau": True}, "True"),
        ({"variance": "full"}, "'diag' or 'exact'"),
        ({"density": 0}, r"\(0, 1\].*got 0"),
        ({"density": 1.01}, r"\(0, 1\].*got 1.01"),
        ({"density": "half"}, "half"),
        ({"density": 0.5, "tau": 1.0}, "give one of them"),
        ({"density": 0.5, "variance": "diag"}, "give one of them"),
        ({"block": 32}, "64 or 128.*32"),
        ({"morton": "yes"}, "True or False"),
        ({"search_every": 0}, "1 or more"),
        ({"compensate": 1}, "True or False; got 1"),
        ({"amount": 1}, "unexpected keyword argument 'amount'"),
    ],
)
def test_bad_settings_say_what_is_valid(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name("compensated", **settings)


@pytest.mark.parametrize("settings", [{}, {"density": 0.25, "morton": True}, {"tau": 2, "variance": "exact"}], ids=str)
def test_settings_build_an_equal_recipe(settings: dict[str, Any]) -> None:
    processor = CompensatedAttnProcessor(**settings)
    assert repr(processor_by_name("compensated", **processor.settings())) == repr(processor)


def test_defaults_are_those_of_sol_attn() -> None:
    wanted = {"tau": 1.0, "variance": "diag", "block": 64, "dense_steps": 0.2, "dense_layers": 1, "search_every": 1}
    assert wanted.items() <= CompensatedAttnProcessor().settings().items()


def test_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="3 padding tokens"):
        CompensatedAttnProcessor().set_up(INFO, TokenLayout((1, 2, 2), (0, 4), padding=3), CPU)
