"""``attention="auto"``: what it decides, and what it says about it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_accel.controls import SiteInfo
from dit_accel.layout import TokenLayout
from dit_accel.plan.simulate import computed_share
from dit_accel.presets import AutoAttnProcessor, ModelFacts, Situation, auto, auto_processor
from dit_accel.presets.auto import FEW_STEPS, PAYS
from dit_accel.presets.estimate import Estimate, attention_share, estimate
from dit_accel.processors import NeighborhoodAttnProcessor

MODELS = {  # class, what tells it apart, width, attention modules
    "wan-14b": ("WanTransformer3DModel", {"num_layers": 40, "num_attention_heads": 40, "in_channels": 16}, 5120, 40),
    "shapes-wan": ("WanTransformer3DModel", {"num_layers": 6, "num_attention_heads": 3}, 192, 6),
    "flux": ("FluxTransformer2DModel", {"num_layers": 19, "num_single_layers": 38}, 3072, 57),
    "sd15": ("UNet2DConditionModel", {"cross_attention_dim": 768}, 320, 16),
}


def video(frames: int, height: int, width: int) -> TokenLayout:
    return TokenLayout.video_only((frames, height, width))


def joint(height: int, width: int, text: int) -> TokenLayout:
    """Flux: the text first."""
    return TokenLayout((1, height, width), (text, text + height * width), text=(0, text))


def situation(model: str, layout: TokenLayout, device: str = "cuda", steps: int | None = 50) -> Situation:
    root, config, width, layers = MODELS[model]
    facts = ModelFacts((root,), config)
    return Situation(facts, layout, model == "sd15", layout.length, width, layers, steps, device)


@pytest.mark.parametrize(
    ("at", "method", "words"),
    [
        # shapes-wan on a CPU: its usual clip is too short, the long one is not.
        (situation("shapes-wan", video(9, 16, 16), "cpu", 20), "dense", ["would not pay", "2,304 tokens", "on CPUs"]),
        (situation("shapes-wan", video(33, 16, 16), "cpu", 12), "compensated", ["8,448 tokens", "radial", "on CPUs"]),
        (situation("shapes-wan", video(1, 16, 16), "cpu", 20), "dense", ["block_routing would not pay", "256 tokens"]),
        # Videos of large models on GPUs: 81 frames of 480p and 720p, and one that is too small.
        (situation("wan-14b", video(21, 30, 52)), "compensated", ["32,760 tokens", "not measured on GPUs"]),
        (situation("wan-14b", video(21, 45, 80)), "compensated", ["75,600 tokens"]),
        (situation("wan-14b", video(3, 30, 52)), "dense", ["would not pay (1.15x is wanted)", "4,680 tokens"]),
        # Radial attention comes into question where frames are many, and wins where it keeps less than a sixth.
        (situation("wan-14b", video(24, 16, 16)), "dense", ["radial"]),
        (situation("wan-14b", video(61, 16, 16)), "compensated", ["radial"]),
        (situation("shapes-wan", video(200, 8, 8)), "radial", ["compensated"]),
        # Few steps, unknown steps, and what radial attention does not accept.
        (situation("wan-14b", video(21, 45, 80), steps=4), "dense", ["4 steps are too few"]),
        (situation("wan-14b", video(21, 45, 80), steps=FEW_STEPS), "compensated", []),
        (situation("wan-14b", video(21, 45, 80), steps=None), "dense", ["set_step(step, steps)"]),
        (situation("wan-14b", replace(video(21, 45, 80), padding=8)), "dense", ["8 padding tokens"]),
        (situation("shapes-wan", TokenLayout((200, 8, 8), (5, 12805), text=(0, 5))), "compensated", []),
        # Images: 1K is small, 2K and 4K are not, and for 4K neighborhoods are published.
        (situation("flux", joint(64, 64, 512), steps=28), "dense", ["block_routing would not pay", "4,608 tokens"]),
        (situation("flux", joint(96, 128, 512), steps=28), "block_routing", ["12,800 tokens"]),
        (situation("flux", joint(128, 128, 512), steps=28), "block_routing", ["16,896 tokens"]),
        (situation("flux", joint(256, 256, 512), steps=28), "neighborhood", ["66,048 tokens", "block_routing"]),
        (situation("flux", joint(256, 256, 512), "cpu", 28), "block_routing", ["measured on CPUs"]),
        # UNets.
        (situation("sd15", video(1, 64, 64)), "agent", ["4,096 tokens", "UNet", "not estimated for this device"]),
        (situation("sd15", video(1, 32, 32)), "dense", ["1,024", "4,096"]),
        (situation("sd15", video(1, 64, 64), steps=4), "dense", ["4 steps"]),
        (replace(situation("sd15", video(1, 128, 128)), tokens=4096), "dense", ["full resolution"]),  # as SDXL
    ],
)
def test_decisions(at: Situation, method: str, words: list[str]) -> None:
    choice = AutoAttnProcessor().for_situation(at)
    assert choice.method == method, choice
    assert (choice.recipe is None) == (method == "dense")
    assert all(word in choice.reason for word in words), choice.reason


def test_a_choice_has_the_published_settings_and_those_given() -> None:
    at = situation("wan-14b", video(21, 45, 80))
    choice = AutoAttnProcessor().for_situation(at)
    assert choice.preset is not None and choice.preset.startswith("wan2.1-14b (Sol-Attn")
    assert choice.recipe is not None and choice.recipe.settings()["dense_layers"] == 1
    mine = AutoAttnProcessor(dense_steps=3, dense_layers=[5], backend="reference", usual={"tau": 2.0, "decay": 0.7})
    recipe = mine.for_situation(at).recipe
    assert recipe is not None
    wanted = {"tau": 2.0, "dense_steps": 3, "dense_layers": [5], "backend": "reference", "variance": "diag"}
    assert wanted.items() <= recipe.settings().items()  # decay belongs to another method
    assert AutoAttnProcessor(presets=False).for_situation(at).preset is None


def test_what_is_given_takes_its_rivals_among_the_usual_settings_along() -> None:
    at = situation("wan-14b", video(21, 45, 80))
    recipe = AutoAttnProcessor(usual={"density": 0.1}).for_situation(at).recipe
    assert recipe is not None and recipe.settings()["density"] == 0.1 and recipe.settings()["tau"] is None


def test_agents_must_reach_a_level_where_the_unet_attends() -> None:
    """One that attends at the full resolution on the way up alone."""
    paths = ["down_blocks.1.attentions.0.attn1", "up_blocks.1.attentions.0.attn1"]
    sites = {SiteInfo(path, "self", i, 2, "unet"): (8, 40) for i, path in enumerate(paths)}
    at = replace(situation("sd15", video(1, 64, 64)), sites=sites)
    choice = AutoAttnProcessor().for_situation(at)
    assert choice.method == "dense" and choice.recipe is None and "use max_downsample=2 or more" in choice.reason
    assert AutoAttnProcessor(usual={"max_downsample": 2}).for_situation(at).method == "agent"


def test_text_counts_once_in_a_budget_of_all_blocks() -> None:
    """A quarter of all blocks for the rows of the image, text among them, and all for those of the text."""
    choice = AutoAttnProcessor(usual={"amount": 0.25}).for_situation(situation("flux", joint(64, 64, 512), steps=28))
    image = 4096 / 4608
    assert f"{0.25 * image + 1 - image:.0%} of the pairs" in choice.reason and "33%" in choice.reason


def test_a_method_whose_settings_do_not_fit_is_left_out_aloud() -> None:
    at = situation("flux", joint(256, 256, 512), steps=28)
    choice = AutoAttnProcessor(usual={"window": (18, 24, 24)}).for_situation(at)
    assert choice.method == "block_routing" and "not neighborhood: " in choice.reason


def test_layers_that_differ_are_counted_by_their_number() -> None:
    sites = {SiteInfo(f"blocks.{layer}.attn1", "joint", layer, 3, "transformer"): (24, 128) for layer in range(3)}
    at = replace(situation("flux", joint(48, 48, 64), steps=28), sites=sites)
    recipe = NeighborhoodAttnProcessor(window=0.3, dilation="alternate", block=64)
    shares = [computed_share(each.build_plan(at.layout, torch.device("cpu"))) for each in map(recipe.for_site, sites)]
    assert shares[0] == shares[2] != shares[1]
    assert auto._density(recipe, at) == pytest.approx(sum(shares) / 3)


def test_more_dense_layers_can_make_it_dense() -> None:
    at = situation("shapes-wan", video(33, 16, 16), "cpu", 12)
    choice = AutoAttnProcessor(dense_layers=5).for_situation(at)
    assert choice.method == "dense" and "would not pay" in choice.reason


@pytest.mark.parametrize(
    ("settings", "preset", "words"),
    [
        ({"decay": 0.2}, "auto", ["decay belongs to one method", "dense_steps", "backend"]),
        ({}, "wan2.1-14b", ["belongs to one method"]),
        ({"usual": {"decy": 0.2}}, "auto", ["'decy'", "usual"]),
        ({"presets": 1}, "auto", ["presets is True or False"]),
        ({"dense_steps": -1}, "auto", ["dense_steps"]),
    ],
)
def test_bad_settings(settings: dict[str, Any], preset: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        auto_processor(settings, preset)
    assert all(word in str(error.value) for word in words)


def test_settings_rebuild_it() -> None:
    for layers in (2, {3, 0}):
        mine = AutoAttnProcessor(dense_steps=0.5, dense_layers=layers, usual={"block": 64}, presets=False)
        plain = json.loads(json.dumps(mine.settings()))
        assert plain == mine.settings() == AutoAttnProcessor(**plain).settings()
    assert AutoAttnProcessor(**AutoAttnProcessor().settings()).settings() == AutoAttnProcessor().settings()
    assert auto_processor({}, None).presets is False and auto_processor({}).presets is True


def test_blocks_that_are_kept_in_part_are_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that slides by single tokens fits no block, so kernels compute more pairs than it keeps."""
    asked: dict[str, float] = {}

    def watched(method: str, **facts: Any) -> Estimate:
        asked[method] = facts["density"]
        return estimate(method, **facts)

    monkeypatch.setattr(auto, "estimate", watched)
    monkeypatch.setattr(auto, "LONG_SIDE", 32)
    layout = joint(32, 40, 64)
    AutoAttnProcessor().for_situation(situation("flux", layout, steps=28))
    plan = NeighborhoodAttnProcessor().build_plan(layout, torch.device("cpu"))
    assert asked["neighborhood"] == pytest.approx(computed_share(plan))
    assert computed_share(plan) > 1.05 * plan.density


def test_estimates_follow_amdahl() -> None:
    """What was measured in docs/benchmarks.md: 1.35x for 129 frames, 0.85x for 33, by radial attention."""
    long = estimate("radial", tokens=8448, width=192, density=0.33, dense_share=0.375, device="cpu")
    short = estimate("radial", tokens=2304, width=192, density=0.70, dense_share=0.375, device="cpu")
    assert short.speedup < 1 < PAYS < long.speedup < 1.4
    assert long.measured and not estimate("radial", tokens=9, width=9, density=1, dense_share=0, device="mps").measured
    share = attention_share(8448, 192, "cpu")
    assert long.speedup == pytest.approx(1 / (1 - share + share * (0.375 + 0.625 * 0.33 / 0.5)))
    assert attention_share(75600, 5120, "cuda") > attention_share(32760, 5120, "cuda") > 0.3
