"""ProfilingDiT's parts (arXiv 2504.03140), each against its formula in plain loops."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.caching.profiling import (
    BlockProfile,
    Saliency,
    Scene,
    SubjectWords,
    blocks_for,
    cost,
    load_profile,
    predicted_speedup,
)
from dit_accel.caching.profiling.budget import Budget
from dit_accel.caching.profiling.denoised import denoise, latents_of, paired
from dit_accel.caching.profiling.enrichment import enrichment
from dit_accel.caching.profiling.masks import source_of, token_mask
from dit_accel.caching.profiling.otsu import otsu_mask
from dit_accel.caching.profiling.profile import config_hash
from dit_accel.caching.profiling.published import PUBLISHED, STEPWISE
from dit_accel.caching.profiling.received import (
    ReceivedAttentionRecorder,
    WordAttentionRecorder,
    received_attention,
    sampled_rows,
)
from dit_accel.caching.profiling.schedule import computed_steps, schedule_of
from dit_accel.clock import StepState
from dit_accel.controls import AttentionCall, SiteInfo
from dit_accel.layout import TokenLayout

many = settings(max_examples=50, deadline=None, derandomize=True)


def full_softmax(query, key):
    """Every weight, by the definition: ``[batch][head][query][key]`` as float64."""
    weights = torch.zeros(query.shape[0], query.shape[1], query.shape[2], key.shape[2], dtype=torch.float64)
    for b, h, i in (
        (b, h, i) for b in range(weights.shape[0]) for h in range(weights.shape[1]) for i in range(weights.shape[2])
    ):
        scores = [math.exp(float(query[b, h, i].double() @ k) / math.sqrt(query.shape[3])) for k in key[b, h].double()]
        weights[b, h, i] = torch.tensor(scores) / sum(scores)
    return weights


@pytest.mark.parametrize("rows", [None, [0, 3, 4]])
def test_received_attention_is_the_column_mean_of_the_full_softmax(rows):
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 7, 4)
    found = received_attention(query, key, None if rows is None else torch.tensor(rows))
    weights = full_softmax(query, key)[:, :, rows or range(6)]
    assert torch.allclose(found.double(), weights.mean((1, 2)), atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(2), atol=1e-5)
    assert not torch.allclose(found, torch.full_like(found, 1 / 7), atol=1e-2), "a row mean would be constant"


def test_a_sample_of_queries_comes_close_to_all_of_them():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 512, 8), torch.randn(1, 2, 512, 8) + torch.linspace(0, 2, 512)[:, None]
    exact = received_attention(query, key)
    sampled = received_attention(query, key, sampled_rows((4, 8, 16), 256))
    assert float((sampled - exact).norm() / exact.norm()) < 0.1
    assert torch.corrcoef(torch.cat([sampled, exact]))[0, 1] > 0.95


@many
@given(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9)), st.integers(1, 80))
def test_rows_are_shared_out_evenly_over_the_frames(grid, count):
    rows = sampled_rows(grid, count).tolist()
    size = grid[1] * grid[2]
    assert len(rows) == min(count, math.prod(grid)) and rows == sorted(set(rows))
    assert min(rows) >= 0 and max(rows) < math.prod(grid)
    shares = [sum(row // size == frame for row in rows) for frame in range(grid[0])]
    assert max(shares) - min(shares) <= 1


def test_rows_are_in_other_columns_in_each_frame():
    columns = {int(row) % 8 for row in sampled_rows((6, 8, 8), 48)}
    assert len(columns) >= 6, "the stride of 8 would see one column"


def call_of(layout, kind="self", path="blocks.0.attn1"):
    state = StepState(0, 2, 10, "cond", "transformer", 0, layout, None)
    return AttentionCall(SiteInfo(path, kind, 0, 1, "transformer"), state, layout)


def test_the_recorder_keeps_the_video_tokens_of_a_joint_call_in_raster_order():
    torch.manual_seed(0)
    layout = TokenLayout((2, 2, 3), (3, 15), text=(0, 3), padding=2)
    query, key = torch.randn(1, 2, 17, 4), torch.randn(1, 2, 17, 4)
    recorder = ReceivedAttentionRecorder(rows=100)
    recorder.record(call_of(layout), query, key, key, query)
    want = full_softmax(query[:, :, 3:15], key[:, :, :15]).mean((1, 2))[:, 3:]
    found = recorder.calls["blocks.0.attn1"]
    assert torch.allclose(found.double(), want, atol=1e-6)
    order = torch.cat([torch.arange(3), torch.randperm(12) + 3, torch.arange(15, 17)])
    moved = TokenLayout(layout.grid, layout.visual, layout.text, padding=2, order=order)
    recorder.record(call_of(moved), query[:, :, order], key[:, :, order], key, query)
    assert torch.allclose(recorder.calls["blocks.0.attn1"], found, atol=1e-6)


def test_the_recorder_looks_at_the_steps_and_branches_asked_for():
    recorder = ReceivedAttentionRecorder(steps=[2, 5], branches=["cond"])
    layout = TokenLayout.video_only((1, 1, 2))
    states = [StepState(0, step, 9, name, "t", 0, layout, None) for step in range(6) for name in ("cond", "uncond")]
    assert [(state.step, state.branch) for state in states if recorder.acts_at(state)] == [(2, "cond"), (5, "cond")]
    with pytest.raises(ValueError, match="at least 1"):
        ReceivedAttentionRecorder(rows=0)


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_words_get_their_share_of_the_attention_to_text(kind):
    torch.manual_seed(0)
    layout = TokenLayout((1, 2, 3), (4, 10), text=(0, 4)) if kind == "joint" else TokenLayout.video_only((1, 2, 3))
    query = torch.randn(1, 2, layout.length, 4)
    key = torch.randn(1, 2, 10 if kind == "joint" else 4, 4)
    recorder = WordAttentionRecorder([1, 3])
    recorder.record(call_of(layout, kind), query, key, key, query)
    weights = full_softmax(query[:, :, slice(*layout.visual)], key[:, :, :4])
    want = (weights[..., 1] + weights[..., 3]).mean(1)
    assert torch.allclose(recorder.calls["blocks.0.attn1"].double(), want, atol=1e-6)
    with pytest.raises(ValueError, match="from 0 to 3"):
        WordAttentionRecorder([4]).record(call_of(layout, kind), query, key, key, query)
    with pytest.raises(ValueError, match="places of text tokens"):
        WordAttentionRecorder([])


def brute_otsu(values):
    """Tries every threshold."""
    best, found = -1.0, [False] * len(values)
    for threshold in sorted(set(values))[:-1]:
        lower, upper = [v for v in values if v <= threshold], [v for v in values if v > threshold]
        apart = sum(upper) / len(upper) - sum(lower) / len(lower)
        between = len(lower) * len(upper) * apart * apart
        if between > best * (1 + 1e-12):
            best, found = between, [v > threshold for v in values]
    return found


@many
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=14))
def test_otsu_finds_what_trying_every_threshold_finds(values):
    assert otsu_mask(torch.tensor([values, values[::-1]]).float()).tolist() == [
        brute_otsu(values),
        brute_otsu(values[::-1]),
    ]


def test_otsu_parts_two_clusters_row_by_row():
    rows = torch.tensor([[0.1, 5.0, 0.0, 5.2, 0.2], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert otsu_mask(rows).tolist() == [[False, True, False, True, False], [False] * 5]


def plain_enrichment(scores, mask):
    """Over all ways to break ties, on average."""
    size = sum(mask)
    if size in (0, len(mask)):
        return math.nan
    threshold = sorted(scores, reverse=True)[size - 1]
    above = [s > threshold for s in scores]
    level = [s == threshold for s in scores]
    part = (size - sum(above)) / sum(level)
    both = sum(m * (a + part * e) for m, a, e in zip(mask, above, level, strict=True))
    return both / size / (size / len(mask))


@many
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12))
def test_enrichment_is_what_the_formula_says(tokens):
    scores, mask = (list(part) for part in zip(*tokens, strict=True))
    found = enrichment(torch.tensor([scores]).float(), torch.tensor([mask]))
    assert found.tolist() == pytest.approx([plain_enrichment(scores, mask)], nan_ok=True, rel=1e-5)


def test_enrichment_of_known_blocks():
    mask = torch.tensor([True, True, False, False, False, False, False, False])
    on, off, flat = mask.float(), 1 - mask.float(), torch.ones(8)
    found = enrichment(torch.stack([on, off, flat]), mask.expand(3, -1))
    assert found.tolist() == pytest.approx([4, 0, 1]), "all of a quarter; none; chance"


def test_enrichment_of_random_scores_is_chance():
    torch.manual_seed(0)
    mask = torch.rand(400, 60) < 0.3
    assert float(enrichment(torch.rand(400, 60), mask).nanmean()) == pytest.approx(1, abs=0.05)


def scene(denoised, grid, words=None):
    return Scene(denoised, grid, 0, "cond", "transformer", words or {})


def moving_square(frames=4):
    """A bright square that moves right over a still gradient, and where it is."""
    video = torch.linspace(0, 0.3, 16).repeat(16, 1)[None, None, None].repeat(1, 3, frames, 1, 1)
    where = torch.zeros(frames, 16, 16, dtype=torch.bool)
    for frame in range(frames):
        where[frame, 4:8, 2 * frame : 2 * frame + 4] = True
    return video.masked_fill(where, 2.0), where


def test_saliency_finds_what_moves_and_stands_out():
    video, where = moving_square()
    mask = token_mask(Saliency()(scene(video, (4, 8, 8))), (4, 8, 8), 1)[0]
    truth = where[:, ::2, ::2].flatten(1)
    assert float(mask[truth].float().mean()) > 0.8
    assert float(mask[~truth].float().mean()) < 0.1, "places just left or about to be entered change as well"
    still = video[:, :, :1]
    alone = token_mask(Saliency()(scene(still, (1, 8, 8))), (1, 8, 8), 1)[0]
    assert torch.equal(alone, truth[:1])
    with pytest.raises(ValueError, match="spatial weight"):
        Saliency(spatial=0)(scene(still, (1, 8, 8)))
    with pytest.raises(ValueError, match="not both 0"):
        Saliency(0, 0)


def test_change_alone_follows_motion_and_not_what_stands_still():
    video, where = moving_square()
    video[:, :, :, 12:15, 12:15] = 3.0  # bright, but still
    mask = Saliency(spatial=0)(scene(video, (4, 16, 16)))[0]
    assert not mask[:, 12:15, 12:15].any() and mask[1][where[1] & ~where[0]].all()


def test_words_make_a_mask():
    shares = torch.full((1, 2 * 6), 0.1)
    shares[0, [1, 8]] = 0.9
    found = SubjectWords((2,))(scene(torch.zeros(1, 1, 2, 2, 3), (2, 2, 3), {"a": shares, "b": shares / 2}))
    assert found.flatten().nonzero().flatten().tolist() == [1, 8]
    with pytest.raises(ValueError, match="attends to no text"):
        SubjectWords((2,))(scene(torch.zeros(1, 1, 2, 2, 3), (2, 2, 3)))


def test_masks_of_ones_own_come_down_to_the_grid():
    picture = torch.zeros(8, 12)
    picture[:4, 4:8] = 1
    for own in (picture, picture[None], picture.expand(6, 8, 12), picture.bool()):
        found = token_mask(source_of(own)(scene(torch.zeros(2, 1, 3, 4, 6), (3, 2, 3))), (3, 2, 3), 2)
        assert found.shape == (2, 3, 6) and found[1, 2].nonzero().flatten().tolist() == [1]
    assert source_of(None) == Saliency()


@pytest.mark.parametrize(
    ("shape", "grid", "words"),
    [
        ((3, 8, 8), (1, 4, 4), "makes images"),
        ((3, 3), (2, 4, 4), "smaller than the token grid"),
        ((2, 8, 8), (4, 4, 4), "smaller than the token grid"),
        ((3, 4, 8, 8), (4, 4, 4), "batch of 3"),
        ((8,), (1, 4, 4), "height, width"),
    ],
)
def test_masks_that_do_not_fit_are_refused(shape, grid, words):
    with pytest.raises(ValueError, match=words):
        token_mask(torch.ones(shape), grid, 2)


def test_sources_that_are_none_are_refused():
    with pytest.raises(ValueError, match="height, width"):
        source_of(torch.ones(4))
    with pytest.raises(ValueError, match="got str"):
        source_of("the cat")


def test_flow_matching_gives_back_the_clean_latents():
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    flow = SimpleNamespace(config=SimpleNamespace(), sigmas=torch.tensor([0.9, 0.4, 0.0]))
    found = denoise(flow, 0.6 * clean + 0.4 * noise, noise - clean, 1, torch.tensor(400))
    assert torch.allclose(found, clean, atol=1e-6)
    with pytest.raises(ValueError, match="no noise level for step 3"):
        denoise(flow, clean, noise, 3, 0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_gives_back_the_clean_latents(kind):
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    scheduler = SimpleNamespace(config=SimpleNamespace(prediction_type=kind), alphas_cumprod=torch.tensor([0.9, 0.36]))
    noisy = 0.6 * clean + 0.8 * noise
    output = {"epsilon": noise, "v_prediction": 0.6 * noise - 0.8 * clean, "sample": clean}[kind]
    assert torch.allclose(denoise(scheduler, noisy, output, 0, torch.tensor([1])), clean, atol=1e-5)


def test_every_shape_of_latents_comes_to_the_same_grid():
    layout = TokenLayout((2, 2, 3), (5, 17), text=(0, 5))
    video = torch.arange(4 * 2 * 2 * 3).float().view(1, 4, 2, 2, 3)
    conditioned = torch.cat([video, torch.ones(1, 3, 2, 2, 3)], 1)
    packed = video.flatten(2).transpose(1, 2)
    with_reference = torch.cat([packed, torch.ones(1, 6, 4)], 1)
    frames_first = video.transpose(1, 2)
    for shaped, first in (
        (video, False),
        (conditioned, False),
        (packed, False),
        (with_reference, False),
        (frames_first, True),
    ):
        output = shaped if shaped.shape != conditioned.shape else video
        assert all(torch.equal(part, video) for part in paired(shaped, output, layout, first))
    image = video[:, :, 0]
    assert torch.equal(paired(image, image, layout, False)[0], video[:, :, :1])
    with pytest.raises(ValueError, match="2 x 2 x 3"):
        paired(torch.ones(1, 5, 4), torch.ones(1, 5, 4), layout, False)
    with pytest.raises(ValueError, match="takes no hidden_states or sample"):
        latents_of({"x": video}, "Other")


def test_the_cost_model_gives_the_published_figures():
    """Wan: 14 full steps and 36 of 12 blocks; Hunyuan: 60 blocks of equal cost."""
    wan, hunyuan = PUBLISHED["wan2.1-14b"], PUBLISHED["hunyuan-video"]
    uniform = computed_steps(schedule_of("uniform"), 50)
    assert len(uniform) == 14 and len(wan.blocks) == 28
    assert cost(40, len(wan.blocks), 50, len(uniform)) == pytest.approx((14 * 40 + 36 * 12) / 2000)
    assert cost(40, 28, 50, 14) == pytest.approx(0.496)
    assert predicted_speedup(40, 28, 50, 14) == pytest.approx(2.016, abs=5e-4)
    shrinking = computed_steps(schedule_of("shrinking"), 50)
    assert shrinking == (*range(6), *STEPWISE) and len(hunyuan.blocks) == 38
    assert predicted_speedup(60, len(hunyuan.blocks), 50, len(shrinking)) == pytest.approx(1.84, abs=5e-3)
    assert predicted_speedup(40, 28, 10**6, 1) == pytest.approx(40 / 12, rel=1e-5), "the ceiling"


def test_blocks_for_a_speed_up():
    assert blocks_for(2.016, 40, 50, 14) == 28 and blocks_for(2.0161, 40, 50, 14) == 28
    assert blocks_for(2.02, 40, 50, 14) == 29
    assert blocks_for(50 / 14, 40, 50, 14) == 40
    for bad in (1.0, 3.6):
        with pytest.raises(ValueError, match=r"at most 3\.571"):
            blocks_for(bad, 40, 50, 14)
    for numbers in ((0, 0, 5, 1), (4, 5, 5, 1), (4, 2, 5, 6)):
        with pytest.raises(ValueError, match="can be"):
            cost(*numbers)


@pytest.mark.parametrize("bad", [0, 1, 1.5, -0.1, math.nan, True, "half"])
def test_budgets_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        Budget(bad).count(40, None)


def test_budgets():
    assert Budget(0.7).count(40, None) == 28 and Budget(0.01).count(40, None) == 1 and Budget(0.99).count(4, None) == 3
    assert Budget(speedup=2.016).count(40, 50) == 28
    for bad in ({}, {"part": 0.5, "speedup": 2.0}):
        with pytest.raises(ValueError, match="either a part"):
            Budget(**bad)
    with pytest.raises(ValueError, match="give steps"):
        Budget(speedup=2).count(40, None)


def test_schedules():
    assert computed_steps(schedule_of("uniform", dense_steps=2, interval=3), 10) == (0, 1, 2, 5, 8)
    assert computed_steps(schedule_of([4, 7], dense_steps=1), 9) == (0, 4, 7)
    assert computed_steps(schedule_of([4], dense_steps=0), 6) == (0, 4), "the first step has nothing to reuse"
    for bad, words in (("growing", "uniform, shrinking"), (None, "uniform, shrinking")):
        with pytest.raises(ValueError, match=words):
            schedule_of(bad)
    with pytest.raises(ValueError, match="dense_steps"):
        schedule_of("uniform", dense_steps=-1)


ROOT = type("Toy", (), {"config": {"dim": 4, "_name_or_path": "here"}})()


def profile(**changes):
    facts = {"model": "Toy", "config": config_hash(ROOT), "layers": 4, "method": "profile"}
    scores = {"scores": (0.5, 1.5, 0.5, 0.1), "blocks": (0, 3)}
    return BlockProfile(**(facts | scores | changes))


def test_a_profile_ranks_and_chooses():
    assert profile().order == (3, 0, 2, 1)
    assert profile().with_budget(0.75).blocks == (0, 2, 3) and profile().with_count(1).blocks == (3,)
    for bad in (0, 5):
        with pytest.raises(ValueError, match="1 to 4"):
            profile().with_count(bad)


def test_a_profile_survives_its_file(tmp_path):
    made = profile(by_expert={"a": (0.0, 1.0, 2.0, 3.0)}, settings={"steps": 3, "prompts": ["é"]})
    made.save(tmp_path / "blocks.json")
    assert load_profile(tmp_path / "blocks.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["blocks.json"]


def test_files_that_are_no_profile_are_refused(tmp_path):
    file = tmp_path / "blocks.json"
    with pytest.raises(ValueError, match="there is no block profile"):
        load_profile(file)
    for text, words in (("{", "cannot be read"), ("[]", "no block profile"), ('{"format": "x"}', "of this version")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_profile(file)
    profile().save(file)
    good = json.loads(file.read_text())
    for change in (
        {"layers": 5},
        {"blocks": [9]},
        {"blocks": []},
        {"method": "x"},
        {"scores": [0, 1, 2, "x"]},
        {"y": 1},
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=r"damaged.*dit-accel profile-blocks"):
            load_profile(file)


def test_a_profile_is_for_its_model_only():
    profile().check(ROOT, 4)
    named = type("Toy", (), {"config": {"dim": 4, "_name_or_path": "elsewhere"}})()
    profile().check(named, 4)
    other = type("Toy", (), {"config": {"dim": 8}})()
    foreign = type("Other", (), {"config": {"dim": 4}})()
    for root, layers, words in (
        (other, 4, "another configuration"),
        (ROOT, 3, "this one has 3"),
        (foreign, 4, "Other"),
    ):
        with pytest.raises(ValueError, match=words):
            profile().check(root, layers)
