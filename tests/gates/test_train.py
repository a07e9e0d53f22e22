"""What is recorded, and that gates learn from it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.clock import StepState
from dit_accel.controls import AttentionCall, SiteInfo
from dit_accel.gates.data import GateRecorder, SiteSamples, spread
from dit_accel.gates.distill import distill
from dit_accel.gates.train import (
    Calls,
    GateTraining,
    block_recall,
    distillation_loss,
    initial_gate,
    learning_rate_factor,
    levels_of,
    recalls,
    train_gates,
)
from dit_accel.kernels.gate.gate import at_level, gate_logits
from dit_accel.kernels.gate.reference import reference_maps
from dit_accel.layout import TokenLayout

SITE = SiteInfo("blocks.0.attn1", "self", 0, 1, "transformer")
TINY = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 4}  # 3 x 8 x 8 tokens
KEY = ("transformer", "blocks.0.attn1")


def call_at(step: int, layout: TokenLayout, timestep: float | None = 500.0) -> AttentionCall:
    when = None if timestep is None else torch.tensor([timestep])
    return AttentionCall(SITE, StepState(0, step, 10, "cond", "transformer", 0, layout, when), layout)


@pytest.mark.parametrize("text", [None, (0, 6), (21, 27)])
def test_recorded_maps_are_those_of_the_call(text: tuple[int, int] | None) -> None:
    start = text[1] if text and text[0] == 0 else 0
    layout = TokenLayout((3, 1, 7), (start, start + 21), text)
    q, k = torch.randn(2, 2, 2, layout.length, 3)
    recorder = GateRecorder(4)
    recorder.record(call_at(0, layout), q, k, k, q)
    site = recorder.sites[KEY]
    sinks = {token // 4 for token in range(*text)} if text else set()
    rows = [i for i in range(-(-layout.length // 4)) if i not in sinks]
    assert site.rows.tolist() == rows == site.columns.nonzero().flatten().tolist()
    assert site.timesteps == [500.0] * 2
    for b in range(2):
        for h in range(2):
            greatest, share = (torch.tensor(part) for part in reference_maps(q[b, h], k[b, h], 4))
            wanted = greatest[rows] / greatest[rows].amax(-1, keepdim=True)
            assert torch.allclose(site.greatest[b][h].float(), wanted, atol=1e-3)
            assert torch.allclose(site.share[b][h].float(), share[rows], atol=1e-3)
    calls = Calls.of(site, 1000.0)
    assert torch.allclose(calls.teacher.sum(-1), torch.ones(()), atol=1e-5) and calls.keys.shape[2] == len(rows)
    assert calls.level.tolist() == [0.5] * 2


def test_some_rows_and_some_steps_are_enough() -> None:
    layout = TokenLayout.video_only((5, 4, 4))
    recorder = GateRecorder(8, samples=2, rows=3)
    q = torch.randn(1, 2, 80, 4)
    for step in range(10):
        call = call_at(step, layout)
        if recorder.acts_at(call.state):
            recorder.record(call, q, q, q, q)
    site = recorder.sites[KEY]
    assert site.rows.tolist() == spread(10, 3) == [1, 5, 8] and len(site.queries) == 2
    assert site.queries[0].shape == (2, 3, 4) and site.share[0].shape == (2, 3, 10) and site.keys[0].shape[1] == 10
    assert [step for step in range(10) if recorder.acts_at(call_at(step, layout).state)] == [2, 7]


@pytest.mark.parametrize(
    ("layout", "timestep", "message"),
    [
        (TokenLayout((1, 2, 4), (0, 8), padding=2), 1.0, "2 padding tokens"),
        (replace(TokenLayout.video_only((1, 2, 4)), order=torch.arange(8)), 1.0, "token permutation"),
        (TokenLayout.video_only((1, 2, 4)), None, "without one"),
        (TokenLayout.video_only((2, 2, 4)), 1.0, "generations of one size"),
    ],
)
def test_what_cannot_be_recorded(layout: TokenLayout, timestep: float | None, message: str) -> None:
    recorder = GateRecorder(4)
    if message == "generations of one size":
        other = TokenLayout.video_only((1, 4, 4))
        recorder.record(call_at(0, other), *[torch.randn(1, 1, other.length, 2)] * 4)
    tokens = torch.randn(1, 1, layout.length, 2)
    with pytest.raises(ValueError, match=message):
        recorder.record(call_at(0, layout, timestep), tokens, tokens, tokens, tokens)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_output_that_is_not_finite_is_named(value: float) -> None:
    """Training would go wrong later, and blame the learning rate."""
    layout, recorder = TokenLayout.video_only((1, 2, 4)), GateRecorder(4)
    tokens = torch.randn(1, 1, layout.length, 2)
    output = tokens.clone()
    output[0, 0, 3, 1] = value
    message = r"blocks\.0\.attn1 gave NaN or infinity at step 2; try float32 or bfloat16"
    with pytest.raises(ValueError, match=message):
        recorder.record(call_at(2, layout), tokens, tokens, tokens, output)
    assert recorder.sites == {}


@pytest.mark.parametrize("settings", [{"block": 0}, {"samples": 0}, {"rows": -1}])
def test_a_recorder_wants_whole_numbers(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GateRecorder(**settings)


def samples_of(calls: int, timesteps: list[float], seed: int = 0, columns: int = 6, width: int = 8) -> SiteSamples:
    """Keys that tell the column; of the noisy calls column 1 holds everything, of the others column 3."""
    names = torch.randn(1, columns, 3 * width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    layout = TokenLayout.video_only((1, 1, columns * 4))
    site = SiteSamples(SITE, layout, 4, torch.arange(columns), torch.ones(columns, dtype=torch.bool))
    for i in range(calls):
        site.queries.append(torch.randn(1, columns, width, generator=generator).half())
        site.keys.append((names + 0.1 * torch.randn(names.shape, generator=generator)).half())
        target = torch.zeros(1, columns, columns)
        target[..., 1 if i % 2 else 3] = 1.0
        site.greatest.append(target.half())
        site.share.append(target.half())
        site.timesteps.append(timesteps[i % len(timesteps)])
    return site


def test_two_steps_that_need_different_blocks_are_learned_by_the_step_alone() -> None:
    training = GateTraining(steps=150, d_gate=8, batch=8, learning_rate=1e-2)
    found: dict[str, float] = {}
    for name, timesteps in (("told", [200.0, 950.0]), ("untold", [500.0])):
        gates, _ = train_gates({KEY: samples_of(32, timesteps)}, training)
        found[name] = recalls({KEY: samples_of(32, timesteps, seed=1)}, gates, 1 / 6)[KEY]["gate"]
    assert found["told"] > 0.99 and 0.3 < found["untold"] < 0.7


@pytest.mark.parametrize("taught", ["mass", "max"])
def test_the_loss_is_the_divergence_from_teacher_to_gate(taught: Any) -> None:
    samples = samples_of(2, [300.0, 900.0])
    maps = {name: [torch.rand(1, 6, 6).half() for _ in range(2)] for name in ("mass", "max")}
    samples.share, samples.greatest = maps["mass"], maps["max"]
    calls = Calls.of(samples, 1000.0, taught)
    wanted = torch.stack(maps[taught]).float()
    assert torch.allclose(calls.teacher, wanted / wanted.sum(-1, keepdim=True))
    gates, _ = train_gates({KEY: samples}, GateTraining(steps=3, d_gate=4))
    logits = gate_logits(calls.queries, calls.keys, at_level(gates[KEY], calls.level)).double()
    total = 0.0
    for b in range(2):
        for row in range(6):
            gate = [math.exp(x - float(logits[b, 0, row].logsumexp(0))) for x in logits[b, 0, row].tolist()]
            total += sum(t * math.log(t / g) for t, g in zip(calls.teacher[b, 0, row].tolist(), gate, strict=True))
    assert float(distillation_loss(gates[KEY], calls)) == pytest.approx(total / 12, rel=1e-4)


def test_recall_is_the_share_of_the_best_blocks() -> None:
    share = torch.tensor([[[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6]]])
    assert block_recall(share, share, 0.5) == pytest.approx((0.7 + 0.8) / 2)
    assert block_recall(-share, share, 0.25) == pytest.approx(0.1)
    assert block_recall(share, share * 0.5, 0.3) == pytest.approx((0.7 + 0.8) / 2)  # the rest is text


def test_the_rate_rises_and_falls() -> None:
    rates = [learning_rate_factor(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[55] == pytest.approx(0.5, abs=1e-6)
    assert all(later <= earlier for earlier, later in pairwise(rates[9:])) and rates[-1] < 0.01
    assert learning_rate_factor(0, 1) == 1.0 and learning_rate_factor(19, 1000) == 1.0


@pytest.mark.parametrize("d_gate", [3, 8, 11])
def test_gates_begin_as_scores_of_mean_vectors(d_gate: int) -> None:
    samples = samples_of(40, [500.0])
    calls = Calls.of(samples, 1000.0)
    gate = initial_gate(calls, d_gate, torch.Generator().manual_seed(0))
    found = gate_logits(calls.queries, calls.keys, at_level(gate, calls.level))
    wanted = calls.queries @ calls.keys[..., -8:].transpose(-1, -2) * 8**-0.5
    error, size = ((x - x.mean(-1, keepdim=True)).norm() for x in (found - wanted, wanted))
    assert error < (1e-3 if d_gate >= 8 else 0.7) * size
    silent = calls._replace(level=torch.rand(40))
    assert torch.equal(found, gate_logits(silent.queries, silent.keys, at_level(gate, silent.level)))


@pytest.mark.parametrize(
    "settings", [{"teacher": "mean"}, {"steps": 0}, {"d_gate": 1.5}, {"batch": True}, {"learning_rate": math.nan}]
)
def test_bad_training(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        GateTraining(**settings)


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing was recorded"):
        train_gates({}, GateTraining())
    with pytest.raises(ValueError, match="nothing was recorded"):
        train_gates({KEY: samples_of(0, [1.0])}, GateTraining())


@pytest.mark.parametrize(("most", "levels"), [(0.98, 1.0), (1.0, 1.0), (999.0, 1000.0)])
def test_sigmas_and_timesteps_are_told_apart(most: float, levels: float) -> None:
    assert levels_of({KEY: samples_of(4, [0.2, most])}) == levels


@pytest.fixture
def generate(tiny_wan: Any) -> Any:
    tiny_wan.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.randn(1, 16, 64), "negative_prompt_embeds": torch.randn(1, 16, 64)}

    def run(prompt: str, number: int) -> Any:
        generator = torch.Generator().manual_seed(number)
        return tiny_wan(**text, **TINY, generator=generator, output_type="latent").frames

    return run


def test_training_lowers_the_loss_and_leaves_the_model_as_it_is(tiny_wan: Any, generate: Any) -> None:
    # Untrained attention is nearly flat; sharper queries make blocks differ.
    with torch.no_grad():
        for block in tiny_wan.transformer.blocks:
            block.attn1.norm_q.weight.mul_(6)
    before = generate("a", 0)
    told: list[str] = []
    training = GateTraining(steps=60, d_gate=8, batch=8, learning_rate=3e-3)
    gates = distill(
        tiny_wan, ["a", "b"], ["c"], generate, training=training, samples=2, density=0.34, tell=told.append
    )
    assert torch.equal(generate("a", 0), before) and dit_accel.acceleration_of(tiny_wan) is None
    loss, recall = gates.training["loss"], gates.training["held_out_recall"]
    assert loss["last"] < 0.8 * loss["first"]
    assert recall["gate"] <= recall["mass"] + 1e-6 and set(recall["sites"]) == set(gates.sites)
    assert set(gates.sites) == {f"transformer:blocks.{i}.attn1" for i in range(2)} and gates.layers == {"self": 2}
    assert (gates.family, gates.block, gates.levels) == ("WanTransformer3DModel", 64, 1000.0)
    assert gates.training["prompts"] == ["a", "b"] and gates.training["grid"] == [3, 8, 8]
    assert "[3/3] recorded: c" in told and any("loss" in line for line in told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "at least one"),
        ({"held_out": ["a"]}, "'a' is both"),
        ({"block": 32}, "64 or 128"),
        ({"density": 1.5}, r"\(0, 1\]"),
        ({"samples": 0}, "at least 1"),
    ],
)
def test_bad_distillation(tiny_wan: Any, changes: dict[str, Any], message: str) -> None:
    def never(prompt: str, number: int) -> None:
        raise AssertionError("nothing may run before the settings are checked")

    chosen: dict[str, Any] = {"prompts": ["a"], "held_out": ["b"], "training": GateTraining()} | changes
    with pytest.raises(ValueError, match=message):
        distill(tiny_wan, chosen.pop("prompts"), chosen.pop("held_out"), never, **chosen)


def test_an_expert_that_never_ran_is_named(tiny_wan: Any, make_tiny_wan: Any, generate: Any) -> None:
    tiny_wan.register_modules(transformer_2=make_tiny_wan(1).transformer)
    tiny_wan.register_to_config(boundary_ratio=0.0)
    with pytest.raises(ValueError, match="transformer_2"):
        distill(tiny_wan, ["a"], ["b"], generate, training=GateTraining(), samples=1)
