"""Cluster attention against the formulas of Sparse VideoGen 2, at single sites and in whole models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.install.site import Site
from dit_accel.kernels.cluster import plan as module
from dit_accel.kernels.search.plan import device_density
from dit_accel.kernels.sparse_plan import SparsePlan
from dit_accel.layout import TokenLayout
from dit_accel.processors import ClusterAttnProcessor, processor_by_name
from dit_accel.processors.cluster import usual_clusters

from ..seams.conftest import Subject, build_image_subject, build_subject
from . import cluster_oracle as oracle

INFO = SiteInfo("blocks.1.attn1", "self", 1, 3, "transformer")
CPU = torch.device("cpu")
GRID = (5, 7, 9)
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


def tensors(layout: TokenLayout, seed: int, *, batch: int = 1, heads: int = 2, width: int = 8) -> list[Tensor]:
    """Queries, keys and values around a few centers, in an order that blocks of the sequence cannot follow."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, batch, heads, 6, width, generator=generator) * 2
    which = torch.randint(6, (layout.length,), generator=generator)
    noise = torch.randn(3, batch, heads, layout.length, width, generator=generator)
    return list(centers[:, :, :, which] + 0.4 * noise)


def attend(processor: ClusterAttnProcessor, layout: TokenLayout, qkv: list[Tensor]) -> tuple[Tensor, SparsePlan]:
    """One call at a site by itself; returns its output and the plan that it found."""
    site = Site(INFO)
    site.layout = layout
    site.prepare(StepState(0, 9, 20, "cond", "transformer", 0, layout, None), search=processor, device=CPU)
    out = site.attend(*qkv, scale=None, plain=True, stock=lambda q, k, v: pytest.fail("ran dense"))
    assert site.found is not None
    return out, site.found


def dense_attention(qkv: list[Tensor]) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])


def masked(qkv: list[Tensor], mask: Tensor) -> Tensor:
    q, k, v = qkv
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def draw_case(data: Any) -> tuple[TokenLayout, list[Tensor], dict[str, Any]]:
    """A layout, tensors, and settings without the rule that chooses."""
    grid = tuple(data.draw(st.integers(1, n)) for n in (3, 5, 5))
    layout = layout_of(grid, data.draw(st.sampled_from(["absent", "before", "after"])), data.draw(st.integers(1, 20)))
    options = {
        "q_clusters": data.draw(st.integers(1, 8)),
        "k_clusters": data.draw(st.integers(1, 12)),
        "first_iterations": data.draw(st.integers(1, 3)),
        "block": data.draw(st.sampled_from([16, 32])),
    }
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    return layout, tensors(layout, data.draw(st.integers(0, 9999)), batch=batch, heads=heads), options


def sides(layout: TokenLayout, qkv: list[Tensor], options: dict[str, Any], b: int, h: int) -> Any:
    """The clusters of one head, and what a key weighs."""
    text = range(*(layout.text or (0, 0)))
    tokens = math.prod(layout.grid)
    found = [
        oracle.side(x[b, h].double(), text, min(options[name], tokens), options["first_iterations"])
        for x, name in ((qkv[0], "q_clusters"), (qkv[1], "k_clusters"))
    ]
    return (*found, oracle.weights(found[0], found[1], qkv[0].shape[-1] ** -0.5))


def heads_of(qkv: list[Tensor]) -> list[tuple[int, int]]:
    return [(b, h) for b in range(qkv[0].shape[0]) for h in range(qkv[0].shape[1])]


@pytest.mark.parametrize("boundaries", ["keep", "exact"])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_top_p_follows_the_formula(boundaries: Any, data: Any) -> None:
    layout, qkv, options = draw_case(data)
    top_p, ratio = data.draw(st.floats(0.05, 0.99)), data.draw(st.sampled_from([0.0, 0.1, 0.35, 1.0]))
    processor = ClusterAttnProcessor(top_p=top_p, min_kc_ratio=ratio, boundaries=boundaries, **options)
    out, plan = attend(processor, layout, qkv)
    mask = plan.element_mask()
    for b, h in heads_of(qkv):
        q, k, weight = sides(layout, qkv, options, b, h)
        sizes = [k.label.count(j) for j in range(len(k.centers))]
        chosen = oracle.by_mass(weight, sizes, top_p, math.ceil(ratio * len(sizes) - 1e-9))
        wanted = oracle.pairs(q, k, chosen)
        if boundaries == "keep":
            assert not (wanted & ~mask[b, h]).any()
            wanted = oracle.snapped(q, k, wanted, processor.block)
        assert torch.equal(mask[b, h], wanted)
    torch.testing.assert_close(out, masked(qkv, mask), rtol=1e-4, atol=1e-4)
    assert float(device_density(plan)) == pytest.approx(float(mask.double().mean()), abs=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_density_with_exact_boundaries_counts_keys(data: Any) -> None:
    layout, qkv, options = draw_case(data)
    density = data.draw(st.floats(0.01, 1.0))
    out, plan = attend(ClusterAttnProcessor(density=density, boundaries="exact", **options), layout, qkv)
    keys = math.ceil(density * layout.length - 1e-9) - layout.text_tokens
    mask = plan.element_mask()
    for b, h in heads_of(qkv):
        q, k, weight = sides(layout, qkv, options, b, h)
        sizes = [k.label.count(j) for j in range(len(k.centers))]
        assert torch.equal(mask[b, h], oracle.pairs(q, k, oracle.by_keys(weight, sizes, max(1, keys))))
    torch.testing.assert_close(out, masked(qkv, mask), rtol=1e-4, atol=1e-4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_density_keeps_the_blocks_of_greatest_mass(data: Any) -> None:
    """Blocks within one cluster have the same mass, so which of these is kept is left open."""
    layout, qkv, options = draw_case(data)
    density = data.draw(st.floats(0.01, 1.0))
    out, plan = attend(ClusterAttnProcessor(density=density, **options), layout, qkv)
    kept, count = plan.to_bool(), math.ceil(density * plan.num_kv_blocks - 1e-9)
    assert plan.order is not None and plan.kv_order is not None
    for b, h in heads_of(qkv):
        q, k, weight = sides(layout, qkv, options, b, h)
        assert plan.order[b, h].tolist() == q.sequence and plan.kv_order[b, h].tolist() == k.sequence
        for row, masses in zip(kept[b, h], oracle.block_mass(q, k, weight, plan.block_q), strict=True):
            inside = [mass for mass, flag in zip(masses, row.tolist(), strict=True) if flag]
            outside = [mass for mass, flag in zip(masses, row.tolist(), strict=True) if not flag]
            assert len(inside) == max(count, masses.count(math.inf))
            assert not outside or min(inside) >= max(outside) * (1 - 1e-4)
    torch.testing.assert_close(out, masked(qkv, plan.element_mask()), rtol=1e-4, atol=1e-4)


def test_reference_images_are_clustered_with_the_rest() -> None:
    layout = TokenLayout((1, 8, 8), (10, 74), text=(0, 10), references=((74, 138),))
    plan = attend(ClusterAttnProcessor(density=0.3, block=16), layout, tensors(layout, 0))[1]
    rows = plan.counts[0, 0].tolist()  # text fills most of the last block
    assert rows == [3] * 8 + [9]


def test_everything_chosen_is_dense_attention() -> None:
    layout = layout_of(GRID, "after", 37)
    qkv = tensors(layout, 0)
    rules: list[dict[str, Any]] = [{"density": 1}, {"density": 1, "boundaries": "exact"}, {"min_kc_ratio": 1}]
    for rule in rules:
        out, plan = attend(ClusterAttnProcessor(**rule), layout, qkv)
        assert plan.element_mask().all()
        torch.testing.assert_close(out, dense_attention(qkv), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["absent", "before", "after"])
@pytest.mark.parametrize("boundaries", ["keep", "exact"])
def test_means_of_sorted_blocks_are_nearer_to_dense_than_nothing(place: str, boundaries: Any) -> None:
    layout = layout_of(GRID, place, 20)
    qkv = tensors(layout, 3)
    options: dict[str, Any] = {"density": 0.3, "q_clusters": 8, "k_clusters": 12, "block": 16}
    dense = dense_attention(qkv)
    with_means, without = (
        attend(ClusterAttnProcessor(**options, boundaries=boundaries, compensate=switch), layout, qkv)[0]
        for switch in (True, False)
    )
    assert (with_means - dense).square().mean() < 0.7 * (without - dense).square().mean()
    text = slice(*(layout.text or (0, 0)))
    torch.testing.assert_close(with_means[:, :, text], dense[:, :, text], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("boundaries", ["keep", "exact"])
def test_short_types(dtype: torch.dtype, boundaries: Any) -> None:
    layout = layout_of(GRID, "before", 20)
    qkv = [x.to(dtype) for x in tensors(layout, 4)]
    out, plan = attend(ClusterAttnProcessor(boundaries=boundaries), layout, qkv)
    wanted = masked([x.float() for x in qkv], plan.element_mask())
    torch.testing.assert_close(out.float(), wanted, rtol=3e-2, atol=3e-2)


def test_later_searches_go_on_from_the_centroids_of_the_one_before() -> None:
    layout = layout_of(GRID, "after", 9)
    options: dict[str, Any] = {"q_clusters": 5, "k_clusters": 7, "first_iterations": 2, "iterations": 3}
    processor = ClusterAttnProcessor(**options, block=16, boundaries="exact")
    first, second = tensors(layout, 1), tensors(layout, 1)
    second = [x + 0.3 * y for x, y in zip(second, tensors(layout, 2), strict=True)]
    setup = processor.set_up(INFO, layout, CPU)
    _, memory = processor.search(first[0], first[1], setup, None, scale=None)
    plan, later = processor.search(second[0], second[1], setup, memory, scale=None)
    text = range(*(layout.text or (0, 0)))
    for h in range(2):
        found = []
        for x, y, name in ((first[0], second[0], "q_clusters"), (first[1], second[1], "k_clusters")):
            start = oracle.side(x[0, h].double(), text, options[name], 2).centers
            found.append(oracle.side(y[0, h].double(), text, options[name], 3, start))
        for centers, side in zip(later, found, strict=True):  # numbered as before
            torch.testing.assert_close(centers[0, h].double(), side.centers, rtol=1e-4, atol=1e-4)
        weight = oracle.weights(found[0], found[1], 8**-0.5)
        sizes = [found[1].label.count(j) for j in range(7)]
        wanted = oracle.pairs(found[0], found[1], oracle.by_mass(weight, sizes, 0.9, 1))
        assert torch.equal(plan.element_mask()[0, h], wanted)


def test_schedules_scale_what_each_head_keeps() -> None:
    layout = TokenLayout.video_only(GRID)
    schedule = {"head_budget": {1: (0.5, 1.5)}}
    _, plan = attend(ClusterAttnProcessor(density=0.4, block=16, schedule=schedule), layout, tensors(layout, 5))
    assert plan.counts[0, 0].unique().tolist() == [4] and plan.counts[0, 1].unique().tolist() == [12]  # of 20
    with pytest.raises(ValueError, match="give a density"):
        ClusterAttnProcessor(schedule=schedule)


@pytest.mark.parametrize(
    ("tokens", "clusters"), [(1, (1, 1)), (2304, (48, 96)), (75600, (300, 1000)), (151200, (600, 2000))]
)
def test_usual_numbers_of_clusters(tokens: int, clusters: tuple[int, int]) -> None:
    assert (usual_clusters(tokens, 300, 48), usual_clusters(tokens, 1000, 24)) == clusters


def subject_of(name: str, make_tiny_wan: Any) -> Subject:
    return build_subject(make_tiny_wan, "t2v") if name == "wan" else build_image_subject(name)


@pytest.mark.parametrize("name", SIZES)
def test_models_forget_between_generations_and_after_removal(name: str, make_tiny_wan: Any) -> None:
    subject, size = subject_of(name, make_tiny_wan), SIZES[name]
    options: dict[str, Any] = {"density": 0.4, "block": 32, "search_every": 2} | ALWAYS
    stock = subject.run(**size, num_inference_steps=4)
    with dit_accel.accelerate(subject.pipe, "cluster", **options) as handle:
        subject.run(seed=5, num_inference_steps=4)  # another resolution
        subject.run(seed=6, **size, num_inference_steps=4)
        second = subject.run(**size, num_inference_steps=4)
        assert handle.report().density < 0.7 and not handle.report().fallbacks
    with dit_accel.accelerate(subject.pipe, "cluster", **options):
        assert torch.equal(subject.run(**size, num_inference_steps=4), second)
    assert not torch.equal(second, stock)
    assert torch.equal(subject.run(**size, num_inference_steps=4), stock)


@pytest.mark.parametrize("name", SIZES)
def test_a_batch_equals_its_samples(name: str, make_tiny_wan: Any) -> None:
    subject, size = subject_of(name, make_tiny_wan), SIZES[name]
    shape = subject.run(**size, num_inference_steps=1).shape[1:]
    prompts: dict[str, Any] = {
        part: torch.randn(2, *x.shape[1:]) for part, x in subject.inputs.items() if "embeds" in part
    }
    noise = torch.randn(2, *shape)
    with dit_accel.accelerate(subject.pipe, "cluster", **ALWAYS):
        together = subject.run(**size, num_inference_steps=2, latents=noise, **prompts)
        for i in range(2):
            one: dict[str, Any] = {part: x[i : i + 1] for part, x in prompts.items()}
            alone = subject.run(**size, num_inference_steps=2, latents=noise[i : i + 1], **one)
            assert torch.allclose(alone[0], together[i], atol=1e-4)


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"density": 0.4, "compensate": True}, 2),  # the first search, and those that remember
        ({"boundaries": "exact", "search_every": 2}, 3),  # and calls that follow
    ],
)
def test_each_kind_of_call_compiles_to_one_graph(make_tiny_wan: Any, options: dict[str, Any], graphs: int) -> None:
    wan, counter = build_subject(make_tiny_wan, "t2v"), CompileCounter()
    with dit_accel.accelerate(wan.pipe, "cluster", block=32, **options, **ALWAYS) as handle:
        eager = wan.run(**SIZES["wan"], num_inference_steps=4)
        expected = handle.report()
        wan.root.compile(fullgraph=True, backend=counter)
        handle.reset_report()
        torch.testing.assert_close(wan.run(**SIZES["wan"], num_inference_steps=4), eager, rtol=1e-4, atol=1e-4)
        assert handle.report() == expected
        assert counter.frame_count == graphs
        with torch._dynamo.config.patch(error_on_recompile=True):
            wan.run(**SIZES["wan"], num_inference_steps=4, seed=3)


@pytest.mark.parametrize("boundaries", ["keep", "exact"])
def test_the_operator_is_a_proper_one(boundaries: Any) -> None:
    layout = layout_of((2, 3, 5), "after", 7)
    q, k, _ = tensors(layout, 0)
    numbers = (30, 37, 4, 6, 2, 16, 0.9, 1, 3, boundaries == "exact", 0.3)
    arguments = (q, k, None, None, None, *numbers)
    torch.library.opcheck(module.cluster_lists, arguments)
    starts = module.cluster_lists(*arguments)[5:7]
    torch.library.opcheck(module.cluster_lists, (q, k, *starts, torch.tensor([[2]]), *numbers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0}, r"\(0, 1\], such as 0.9; got 0"),
        ({"top_p": math.nan}, "got nan"),
        ({"min_kc_ratio": -0.1}, r"\[0, 1\].*got -0.1"),
        ({"density": 0}, r"\(0, 1\], such as 0.25; got 0"),
        ({"density": 1.1}, "got 1.1"),
        ({"density": 0.2, "top_p": 0.9}, "density chooses by itself"),
        ({"q_clusters": 0}, "q_clusters is a whole number, 1 or more; got 0"),
        ({"k_clusters": 2.0}, "k_clusters is a whole number.*2.0"),
        ({"first_iterations": 0}, "first_iterations is a whole number"),
        ({"iterations": True}, "iterations is a whole number.*True"),
        ({"boundaries": "cut"}, "boundaries are 'keep' or 'exact'; got 'cut'"),
        ({"block": 48}, "16, 32, 64, 128 tokens; got 48"),
        ({"search_every": 0}, "search_every"),
        ({"compensate": 1}, "compensate is True or False"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name("cluster", **options)


def test_settings_rebuild_the_recipe() -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"density": 0.3, "boundaries": "exact", "q_clusters": 7, "iterations": 4, "block": 16},
    ]
    for options in cases:
        recipe = ClusterAttnProcessor(**options)
        assert processor_by_name("cluster", **recipe.settings()).settings() == recipe.settings()


def test_tokens_that_are_not_finite_spoil_their_head_alone() -> None:
    layout = layout_of(GRID, "after", 9)
    q, k, v = tensors(layout, 0)
    alone = attend(ClusterAttnProcessor(), layout, [x[:, :1] for x in (q, k, v)])[0]
    k[0, 1, 3, 0] = math.nan
    out, plan = attend(ClusterAttnProcessor(), layout, [q, k, v])
    for order in (plan.order, plan.kv_order):
        assert order is not None and all(sorted(row.tolist()) == list(range(layout.length)) for row in order[0])
    torch.testing.assert_close(out[:, :1], alone)
    assert out[0, 1].isnan().all()  # as dense attention


@pytest.mark.parametrize("options", [{}, {"density": 0.3}, {"density": 0.3, "schedule": {"head_budget": {1: (1, 2)}}}])
def test_heads_in_parts_give_the_same_plan(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(GRID, "before", 9)
    q, k, _ = tensors(layout, 6, batch=2)
    processor = ClusterAttnProcessor(block=16, **options)
    state = StepState(0, 9, 20, "cond", "transformer", 0, layout, None)
    setup = processor.at_step(processor.set_up(INFO, layout, CPU), INFO, state)

    def twice() -> list[Tensor]:
        first, memory = processor.search(q, k, setup, None, scale=None)
        second, centers = processor.search(q + 0.3 * k, k, setup, memory, scale=None)
        parts = (first.order, first.kv_order, second.order, second.kv_order, *memory, *centers)
        return [first.to_bool(), second.to_bool(), *(part for part in parts if part is not None)]

    whole = twice()
    monkeypatch.setattr(module, "_SCORE_BYTES", 1)
    calls, of_heads = [], module._of_heads

    def noted(*given: Any) -> Any:
        calls.append(given[0].shape[1])
        return of_heads(*given)

    monkeypatch.setattr(module, "_of_heads", noted)
    parted = twice()
    assert calls == [1] * 4
    assert len(parted) == len(whole) == 10
    for ours, theirs in zip(parted, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("boundaries", ["keep", "exact"])
@pytest.mark.parametrize("density", [None, 0.3])
def test_a_search_needs_no_value_from_the_device(density: float | None, boundaries: Any) -> None:
    meta, layout = torch.device("meta"), layout_of(GRID, "after", 20)
    q, k = torch.empty(2, 2, 3, layout.length, 8, device=meta)  # has a shape but no values to look at
    processor = ClusterAttnProcessor(block=16, density=density, boundaries=boundaries)
    setup, memory = processor.set_up(INFO, layout, meta), None
    for _ in range(2):
        plan, memory = processor.search(q, k, setup, memory, scale=None)
    assert plan.device.type == "meta" and plan.indices.shape == (2, 3, 21, 21)


def test_autocast_changes_no_plan() -> None:
    """It rounds queries and keys, and nothing of the search."""
    layout = layout_of(GRID, "after", 20)
    qkv = [x + 5 for x in tensors(layout, 2)]
    plain = attend(ClusterAttnProcessor(block=16), layout, [x.bfloat16() for x in qkv])[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attend(ClusterAttnProcessor(block=16), layout, qkv)[1]
    assert torch.equal(cast.element_mask(), plain.element_mask())


@pytest.mark.parametrize(
    ("options", "place", "width"),
    [
        ({"density": 0.3}, "absent", 6),
        ({"density": 0.3}, "after", 21),  # rows of text are as long as there are blocks
        ({"density": 0.3, "boundaries": "exact"}, "absent", 20),
        ({"density": 0.3, "schedule": {"step_budget": [(0.5, 2)]}}, "absent", 20),
        ({}, "absent", 20),
    ],
)
def test_lists_are_as_long_as_any_row_may_be(options: dict[str, Any], place: str, width: int) -> None:
    layout = layout_of(GRID, place, 9)
    plan = attend(ClusterAttnProcessor(block=16, **options), layout, tensors(layout, 0))[1]
    assert plan.indices.shape[-1] == width >= int(plan.counts.max())


def test_layouts_and_sizes_that_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="3 padding tokens"):
        ClusterAttnProcessor().set_up(INFO, TokenLayout(GRID, (0, 315), padding=3), CPU)
    layout = TokenLayout.video_only(GRID)
    monkeypatch.setattr(module, "EXACT_BYTES", 1000)
    with pytest.raises(ValueError, match="boundaries='keep'"):
        attend(ClusterAttnProcessor(boundaries="exact"), layout, tensors(layout, 0))
    monkeypatch.setattr(module, "LIST_BYTES", 100)  # of 2 heads x 5 x 5 blocks, 4 bytes each
    with pytest.raises(ValueError, match=r"315 tokens and 2 heads take.*larger blocks, block=128"):
        attend(ClusterAttnProcessor(), layout, tensors(layout, 0))
    with pytest.raises(ValueError, match="fewer or shorter videos at a time"):
        attend(ClusterAttnProcessor(block=128), layout, [x.repeat(2, 1, 1, 1) for x in tensors(layout, 0)])
