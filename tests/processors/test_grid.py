"""The grid method: which head takes which mask, and at work in a tiny Wan; its masks are in test_grid_masks.py."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.install import TokenPermutation
from dit_accel.kernels.attend import attend
from dit_accel.kernels.grid.lines import best_line
from dit_accel.kernels.grid.masks import chosen_plan
from dit_accel.kernels.grid.probe import mask_errors
from dit_accel.kernels.search.plan import count_density, device_density
from dit_accel.kernels.sparse_plan import SparsePlan
from dit_accel.kernels.token_order import morton_order
from dit_accel.layout import TokenLayout
from dit_accel.processors import GridAttnProcessor, processor_by_name
from dit_accel.processors.grid import Setup

from .grid_oracle import places, tensors

SITE = SiteInfo("blocks.1.attn1", "self", 1, 3, "transformer")
CPU = torch.device("cpu")
GRID = (6, 8, 8)
LAYOUTS = {
    "text absent": TokenLayout.video_only(GRID),
    "text after": TokenLayout(GRID, (0, 384), text=(384, 421)),
    "text before": TokenLayout(GRID, (37, 421), text=(0, 37)),
}


def marked(layout: TokenLayout, label: Any) -> Tensor:
    """One-hot vectors `[N, 64]` by a label of frame, row and column; text has none."""
    rows = [torch.zeros(64) if token is None else torch.eye(64)[label(*token)] for token in places(layout)]
    return torch.stack(rows)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("with_values", [True, False])
def test_heads_within_frames_and_along_time_take_their_masks(
    layout: TokenLayout, seed: int | None, with_values: bool
) -> None:
    processor = GridAttnProcessor(density=0.25, block=64, seed=seed, dense_steps=0)
    heads = [marked(layout, lambda t, y, x: t), marked(layout, lambda t, y, x: y * 8 + x)]
    q = 12 * torch.stack([torch.stack(heads), torch.stack(heads[::-1])])  # the other way round in the second item
    value = tensors(2, 2, layout.length, dim=64)[2]
    setup = processor.set_up(SITE, layout, CPU)
    plan = processor.find_plan(q, q, setup, scale=None, value=value if with_values else None)
    assert plan.order is not None
    assert torch.equal(plan.order, setup.masks.orders[torch.tensor([[0, 1], [1, 0]])])
    dense = torch.nn.functional.scaled_dot_product_attention(q, q, value)
    wrong = chosen_plan(setup.masks, torch.tensor([[1, 0], [0, 1]]))
    video = slice(*layout.visual)
    errors = [(attend(q, q, value, it) - dense)[:, :, video].square().mean().item() for it in (plan, wrong)]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_heads_that_look_at_a_line_find_it(layout: TokenLayout) -> None:
    """A column, a column of every second row, one pixel in all frames, and one in every second frame."""
    wanted = [(8, 3), (16, 11), (64, 44), (128, 70)]
    processor = GridAttnProcessor(pattern="stride", density=0.4, block=64, dense_steps=0)
    raster = torch.tensor([-1 if t is None else (t[0] * 8 + t[1]) * 8 + t[2] for t in places(layout)])
    on = [(raster >= 0) & (raster % stride == phase) for stride, phase in wanted]
    k = torch.stack([12.0 * line.float()[:, None].expand(-1, 16) for line in on])[None]
    setup = processor.set_up(SITE, layout, CPU)
    plan = processor.find_plan(torch.ones_like(k), k, setup, scale=None)
    assert plan.order is not None and setup.lines is not None and setup.lines.strides == (8, 16, 64, 128)
    mask = plan.element_mask()[0]
    for h, (_, phase) in enumerate(wanted):
        assert raster[plan.order[0, h, 0]] == phase
        assert mask[h][:, on[h]].all() and mask[h][on[h]].all()


@pytest.mark.parametrize("pattern", ["spatial_temporal", "stride"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_density_on_the_device_is_exact_and_near_the_goal(pattern: Any, layout: TokenLayout) -> None:
    processor = GridAttnProcessor(pattern=pattern, density=0.6, block=64)
    q, k, _ = tensors(2, 3, layout.length)
    setup = processor.set_up(SITE, layout, CPU)
    plan = processor.find_plan(q, k, setup, scale=None)
    exact = plan.element_mask().double().mean().item()
    assert count_density(plan).density == pytest.approx(exact, abs=1e-12)
    assert device_density(plan).item() == pytest.approx(exact, rel=1e-6)
    assert min(setup.masks.densities) <= exact + 1e-9 and exact <= max(setup.masks.densities) + 1e-9
    assert exact == pytest.approx(0.6, abs=0.06)


@pytest.mark.parametrize("pattern", ["spatial_temporal", "stride"])
def test_choosing_needs_no_value_from_the_device(pattern: Any) -> None:
    q, k, v = (x.to("meta") for x in tensors(2, 3, 384))  # has shapes but no values to look at
    processor = GridAttnProcessor(pattern=pattern, block=64)
    setup = processor.set_up(SITE, LAYOUTS["text absent"], torch.device("meta"))
    plan = processor.find_plan(q, k, setup, scale=None, value=v)
    assert device_density(plan).device.type == "meta"
    assert plan.order is not None and plan.order.shape == (2, 3, 384)


@pytest.mark.parametrize("with_values", [True, False])
def test_autocast_changes_no_measurement(with_values: bool) -> None:
    q, k, v = tensors(1, 4, 384)
    for pattern in PATTERNS:
        setup = GridAttnProcessor(pattern=pattern, block=64).set_up(SITE, LAYOUTS["text absent"], CPU)  # type: ignore[arg-type]

        def measure(setup: Setup = setup) -> tuple[Tensor, ...]:
            if setup.lines is not None:
                return best_line(q + 3, k + 3, setup.lines)
            assert setup.probe is not None
            return (mask_errors(q + 3, k + 3, v if with_values else None, setup.probe),)

        plain = measure()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(measure(), plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["spatial_temporal", "stride"])
def test_half_precision_chooses_alike(pattern: Any, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors(1, 4, 384))
    processor = GridAttnProcessor(pattern=pattern, block=64)
    setup = processor.set_up(SITE, LAYOUTS["text absent"], CPU)
    half = processor.find_plan(q, k, setup, scale=None, value=v)
    full = processor.find_plan(q.float(), k.float(), setup, scale=None, value=v.float())
    assert torch.equal(half.indices, full.indices) and half.order is not None and full.order is not None
    assert torch.equal(half.order, full.order)


def test_queries_are_drawn_by_name_and_seed_and_from_nothing_else() -> None:
    def rows(path: str, layout: TokenLayout, **options: Any) -> Tensor:
        processor = GridAttnProcessor(block=64, **options)
        probe = processor.set_up(SiteInfo(path, "self", 1, 3, "transformer"), layout, CPU).probe
        assert probe is not None
        return probe.rows

    layout = LAYOUTS["text before"]
    before = torch.get_rng_state()
    first = rows("blocks.1.attn1", layout)
    torch.manual_seed(3)
    torch.rand(9)
    assert torch.equal(rows("blocks.1.attn1", layout), first)
    torch.set_rng_state(before)
    rows("blocks.1.attn1", layout)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(rows("blocks.2.attn1", layout), first)
    assert not torch.equal(rows("blocks.1.attn1", layout, seed=1), first)
    assert len(set(first.tolist())) == 64 and all(37 <= row < 421 for row in first.tolist())  # never text
    assert rows("", layout, seed=None, probe_rows=4).tolist() == [37 + 48, 37 + 144, 37 + 240, 37 + 336]
    assert len(rows("", layout, probe_rows=999)) == len(rows("", layout, probe_rows=999, seed=None)) == 384


def test_the_first_frame_is_kept_where_there_is_no_text() -> None:
    def sees_first(layout: TokenLayout, **options: Any) -> bool:
        masks = GridAttnProcessor(density=0.2, block=64, **options).set_up(SITE, layout, CPU).masks
        start = layout.visual[0]
        return bool(chosen_plan(masks, torch.zeros(1, 1).long()).element_mask()[0, 0, :, start : start + 64].all())

    assert sees_first(LAYOUTS["text absent"]) and not sees_first(LAYOUTS["text after"])
    assert sees_first(LAYOUTS["text after"], first_frame=True)
    assert not sees_first(LAYOUTS["text absent"], first_frame=False)


ODD = {"height": 240, "width": 208, "num_frames": 13}  # 4 x 15 x 13 tokens
SETTINGS: dict[str, Any] = {"block": 64, "density": 0.45, "dense_steps": 0, "dense_layers": 0}
PATTERNS = ["spatial_temporal", "stride"]


@pytest.fixture
def pipe(tiny_wan: Any) -> Any:
    tiny_wan.set_progress_bar_config(disable=True)
    return tiny_wan


def generate(pipe: Any, seed: int = 1, batch: int = 1, **changes: Any) -> Tensor:
    """Latents of one generation; the samples of a batch have seeds and texts of their own."""
    parts = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    text = [torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(seed + 50 + i)) for i in range(batch)]
    embeds = {
        "prompt_embeds": torch.stack([t[0] for t in text]),
        "negative_prompt_embeds": torch.stack([t[1] for t in text]),
    }
    size: dict[str, Any] = ODD | {"num_inference_steps": 2}
    latents: Tensor = pipe(**embeds, **(size | changes), generator=parts, output_type="latent").frames
    return latents


class Watched(GridAttnProcessor):
    """Keeps the latest plan it found."""

    plan: SparsePlan

    def find_plan(self, *args: Any, **named: Any) -> SparsePlan:
        assert named["value"].shape == args[0].shape  # of the call, so that errors are those of its output
        self.plan = super().find_plan(*args, **named)
        return self.plan


class Oracle(dit_accel.AttentionControl):
    """Wants the output of dense attention under the mask that was found in this call."""

    def __init__(self, processor: Watched) -> None:
        super().__init__()
        self.processor, self.worst = processor, 0.0
        self.density: list[float] = []

    def record(self, call: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        mask = self.processor.plan.element_mask()
        self.density.append(mask.double().mean().item())
        scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        self.worst = max(self.worst, float((output - scores.softmax(-1) @ value).abs().max()))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_head_attends_under_its_mask(pipe: Any, pattern: Any) -> None:
    processor = Watched(pattern=pattern, **SETTINGS)
    with dit_accel.accelerate(pipe, processor, controls=[oracle := Oracle(processor)]) as handle:
        generate(pipe, num_inference_steps=1)
        report = handle.report()
    assert oracle.worst < 1e-5
    assert len(oracle.density) == 4  # two layers, two branches
    assert report.density == pytest.approx(sum(oracle.density) / 4, rel=1e-5)
    assert report.density == pytest.approx(0.45, abs=0.01)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_everything_at_full_density_and_a_batch_equals_its_samples(pipe: Any, pattern: str) -> None:
    stock = generate(pipe)
    with dit_accel.accelerate(pipe, "grid", **SETTINGS | {"pattern": pattern, "density": 1.0}):
        assert torch.allclose(generate(pipe), stock, atol=1e-4)
    with dit_accel.accelerate(pipe, "grid", pattern=pattern, **SETTINGS):
        together = generate(pipe, batch=2)
        alone = [generate(pipe, seed=seed)[0] for seed in (1, 2)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)
    assert not torch.allclose(alone[0], stock[0], atol=1e-3)
    assert torch.equal(generate(pipe), stock)  # nothing is left after removal


@pytest.mark.parametrize("pattern", PATTERNS)
def test_budgets_of_steps_layers_and_heads(pipe: Any, pattern: Any) -> None:
    schedule: dict[str, Any] = {
        "dense_steps": 0,
        "dense_layers": 0,
        "step_budget": [(1, 1.5)],
        "layer_budget": {0: 0.8},
        "head_budget": {1: [1, 2]},
    }
    options: dict[str, Any] = {"pattern": pattern, "block": 64, "density": 0.4, "schedule": schedule}
    processor = Watched(**options)
    found: list[list[float]] = []

    class Densities(dit_accel.AttentionControl):
        def record(self, call: Any, *tensors: Tensor) -> None:
            found.append(processor.plan.element_mask()[0].double().mean((-1, -2)).tolist())

    with dit_accel.accelerate(pipe, processor, controls=[Densities()]):
        eager = generate(pipe, guidance_scale=1.0)
    with dit_accel.accelerate(pipe, "grid", **options):
        counter = CompileCounter()
        pipe.transformer.compile(fullgraph=True, backend=counter)
        assert torch.equal(generate(pipe, guidance_scale=1.0), eager)
        assert counter.frame_count == 1
    torch._dynamo.reset()
    goals = [(0.32, 0.32), (0.4, 0.8), (0.48, 0.48), (0.6, 1.0)]  # layer by layer, step by step
    least = 0.3824 if pattern == "spatial_temporal" else 0.0  # what a first frame of four and the diagonal come to
    for densities, wanted in zip(found, goals, strict=True):
        for density, goal in zip(densities, wanted, strict=True):
            assert any(density == pytest.approx(either, abs=0.005) for either in (goal, max(goal, least)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_inside_a_token_permutation_the_same_pairs_are_kept(pipe: Any, pattern: str) -> None:
    with dit_accel.accelerate(pipe, "grid", pattern=pattern, **SETTINGS) as handle:
        plain, density = generate(pipe), handle.report().density
    order = TokenPermutation(lambda layout: morton_order(layout.grid))
    with dit_accel.accelerate(pipe, "grid", pattern=pattern, block_hooks=[order], **SETTINGS) as handle:
        assert torch.allclose(generate(pipe), plain, atol=1e-4)
        assert handle.report().density == pytest.approx(density, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"pattern": "stride"}, {"search_every": 3, "compensate": True}])
def test_nothing_is_left_of_other_generations_and_sizes(pipe: Any, options: dict[str, Any]) -> None:
    pipe.set_attn_processor(GridAttnProcessor(**SETTINGS | options))
    generate(pipe, seed=5, height=64, width=48, num_inference_steps=1)
    generate(pipe, seed=6, guidance_scale=1.0, num_inference_steps=1)
    second = generate(pipe, num_inference_steps=3)
    pipe.set_attn_processor(GridAttnProcessor(**SETTINGS | options))
    assert torch.equal(generate(pipe, num_inference_steps=3), second)


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, 1),
        ({"pattern": "stride", "search_every": 2}, 2),
        ({"search_every": 2, "compensate": True, "dense_steps": 1}, 3),
    ],
)
def test_searching_and_following_are_one_graph_each(pipe: Any, options: dict[str, Any], graphs: int) -> None:
    with dit_accel.accelerate(pipe, "grid", **SETTINGS | options) as handle:
        eager = generate(pipe, num_inference_steps=3)
        report = handle.report()
        torch._dynamo.reset()
        counter = CompileCounter()
        pipe.transformer.compile(fullgraph=True, backend=counter)
        handle.reset_report()
        assert torch.equal(generate(pipe, num_inference_steps=3), eager)
        assert handle.report() == report
        assert counter.frame_count == graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "lines"}, "spatial_temporal, stride"),
        ({"density": 0.0}, r"in \(0, 1\].*got 0.0"),
        ({"density": 1.01}, r"in \(0, 1\]"),
        ({"density": math.nan}, "nan"),
        ({"density": True}, "True"),
        ({"density": "half"}, "half"),
        ({"block": 32}, "64 or 128"),
        ({"probe_rows": 0}, "1 or more"),
        ({"probe_rows": 2.5}, "1 or more"),
        ({"seed": -1}, "from 0"),
        ({"seed": 2**32}, r"2\*\*32 - 1"),
        ({"seed": 0.5}, "None for an even spread"),
        ({"first_frame": "yes"}, "True, False"),
        ({"first_frame": 1}, "True, False"),
        ({"first_frame": True, "pattern": "stride"}, "belongs to pattern='spatial_temporal'"),
        ({"multiples": (1,)}, "belong to pattern='stride'"),
        ({"multiples": (), "pattern": "stride"}, "whole numbers from 1"),
        ({"multiples": (0,), "pattern": "stride"}, "whole numbers from 1"),
        ({"multiples": (1.5,), "pattern": "stride"}, "whole numbers from 1"),
        ({"multiples": 2, "pattern": "stride"}, "whole numbers from 1"),
        ({"search_every": 0}, "1 or more"),
        ({"compensate": 1}, "True or False"),
        ({"schedule": {"layer_budget": {1: 0.5}}, "dense_steps": 2}, "both a schedule and dense_steps"),
        ({"amount": 0.2}, "unexpected keyword argument 'amount'"),
    ],
)
def test_bad_settings_say_what_is_valid(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name("grid", **options)


def test_settings_build_an_equal_recipe() -> None:
    for options in ({}, {"pattern": "stride", "multiples": [1, 3]}, {"seed": None, "dense_layers": [0, 2]}):
        processor = processor_by_name("grid", **options)
        assert repr(processor_by_name("grid", **processor.settings())) == repr(processor)
    assert repr(GridAttnProcessor()) == repr(processor_by_name("grid", dense_steps=0.2, dense_layers=1))


def test_what_has_no_time_or_has_padding_is_refused() -> None:
    image: Any = SimpleNamespace(makes_video=False, root_class="FluxTransformer2DModel")
    with pytest.raises(ValueError, match="FluxTransformer2DModel makes single images; use pattern='stride'"):
        GridAttnProcessor().check_family(image)
    GridAttnProcessor(pattern="stride").check_family(image)
    with pytest.raises(ValueError, match="2 frames of tokens or more"):
        GridAttnProcessor().set_up(SITE, TokenLayout.video_only((1, 8, 8)), CPU)
    patterns: list[Any] = ["spatial_temporal", "stride"]
    for pattern in patterns:
        with pytest.raises(ValueError, match="3 padding tokens"):
            GridAttnProcessor(pattern=pattern).set_up(SITE, TokenLayout((2, 2, 2), (0, 8), padding=3), CPU)


def test_searches_have_their_steps() -> None:
    processor = GridAttnProcessor(dense_steps=0.25, search_every=3)
    states = [StepState(0, step, 20, "cond", "transformer", 0, LAYOUTS["text absent"], None) for step in range(20)]
    sparse = [state for state in states if processor.is_sparse(SITE, state)]
    assert [state.step for state in sparse] == list(range(5, 20))
    assert [state.step for state in sparse if processor.renews(SITE, state)] == [5, 8, 11, 14, 17]
