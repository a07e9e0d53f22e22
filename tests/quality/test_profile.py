"""Profiles: files, keys, guards, and the choice among saved ones."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import dit_accel
from dit_accel.caching.policies.static import Static
from dit_accel.caching.predictors.taylor import Taylor
from dit_accel.caching.recipe import Cache
from dit_accel.caching.scopes.output import Output
from dit_accel.quality.automatic import reason_to_stay_off
from dit_accel.quality.guard import ProfileGuard
from dit_accel.quality.key import Key, key_of, same_bucket
from dit_accel.quality.matching import file_name, matching, profile_for, profiles_folder
from dit_accel.quality.profile import Profile, ProfileWarning, load_profile
from dit_accel.quality.sampling import Sampler
from dit_accel.quality.spec import CacheSpec
from dit_accel.quality.target import Target
from dit_accel.quality.tuning import tune

from .conftest import HELD_OUT, PROMPTS, TinyPipeline

SPEC = CacheSpec(12, "output - latents", "line over steps", (0, 1, 4, 8))
TARGET = Target("psnr", 28.0)


def profile_of(pipe: TinyPipeline, **changes: Any) -> Profile:
    key = key_of(pipe).of_run(12, (2, 3, 3), (2.0, None))
    given: dict[str, Any] = {"target": TARGET, "key": key, "spec": SPEC, "reason": "it is good"} | changes
    return Profile(**given)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_profile_comes_back_from_its_file(pipe: TinyPipeline, tmp_path: Path) -> None:
    made = profile_of(pipe, noise_floor={"psnr": float("inf")}, alarms=("look",), candidates=({"cache": "x"},))
    path = made.save(tmp_path / "p.json")
    found = load_profile(path)
    assert (found.target, found.key, found.spec, found.reason) == (made.target, made.key, made.spec, made.reason)
    assert found.noise_floor == {"psnr": "inf"} and found.alarms == ("look",) and found.candidates == made.candidates
    assert found.cache() == Cache(
        Output(residual=True), Static(compute_steps=(0, 1, 4, 8), steps=12), Taylor(1), name="tuned"
    )
    assert "Infinity" not in path.read_text() and list(tmp_path.iterdir()) == [path]


def test_a_profile_that_is_off_says_so(pipe: TinyPipeline, tmp_path: Path) -> None:
    found = load_profile(profile_of(pipe, spec=None, reason="too slow").save(tmp_path / "p.json"))
    assert found.is_off
    with pytest.warns(ProfileWarning, match="too slow"):
        assert found.cache() is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"cache": {"steps": 3}},
        {"cache": {"steps": 3, "scope": "moon", "predictor": "reuse", "computed": [0]}},
        {"cache": {"steps": 3, "scope": "whole", "predictor": "reuse", "computed": [0], "threshold": 0.1}},
        {"cache": SPEC.to_json() | {"computed": [0, 20]}},
        {"cache": SPEC.to_json() | {"computed": ["x"]}},
        {"cache": SPEC.to_json() | {"computed": None, "threshold": "high"}},
        {"cache": SPEC.to_json() | {"warmup": -1}},
        {"key": {}},
        {"measured": 3},
        {"alarms": None},
        {"target": {"kind": "psnr", "value": -1}},
        {"target": 3},
    ],
)
def test_damaged_files_are_refused(pipe: TinyPipeline, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(profile_of(pipe).to_json() | change))
    with pytest.raises(ValueError, match=r"profile|tuned cache|target_psnr"):
        load_profile(path)


@pytest.mark.parametrize(("name", "value"), [("size", []), ("steps", "12"), ("shift", "3"), ("pipeline", None)])
def test_damaged_keys_are_refused_with_the_name_of_the_file(
    pipe: TinyPipeline, tmp_path: Path, name: str, value: Any
) -> None:
    record = profile_of(pipe).to_json()
    record["key"][name] = value
    (tmp_path / "p.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"p\.json.*damaged"):
        load_profile(tmp_path / "p.json")


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_other_files_are_refused_with_a_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    for path in (tmp_path / "p.json", tmp_path / "nothing.json"):
        with pytest.raises(ValueError, match="dit-accel tune"):
            load_profile(path)


@pytest.mark.parametrize("spec", [SPEC, CacheSpec(9, "whole", "reuse", None, 0.25, warmup=2, cooldown=1)])
def test_specs_are_plain_values(spec: CacheSpec) -> None:
    values = json.loads(json.dumps(spec.to_json()))
    assert CacheSpec.from_json(values) == spec and CacheSpec.from_json(values).cache() == spec.cache()
    assert str(len(spec.computed)) in spec.describe() if spec.computed else "0.25" in spec.describe()


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_keys_tell_models_apart(pipe: TinyPipeline) -> None:
    key = key_of(pipe)
    assert key == key_of(TinyPipeline()) and key.model == "tiny/pipeline" and key.shift == 3.0
    finetuned = TinyPipeline()
    with torch.no_grad():
        for weight in finetuned.transformer.parameters():
            weight.add_(0.1)
    assert key.model_differences(key_of(finetuned)) == ["other weights of the model"]
    shifted = TinyPipeline(FlowMatchEulerDiscreteScheduler(shift=5.0))
    assert key.model_differences(key_of(shifted)) == ["shift 5.0 in place of 3.0"]
    half = TinyPipeline()
    half.transformer.to(torch.bfloat16)
    assert key.model_differences(key_of(half)) == ["dtype bfloat16 in place of float32"]
    assert key.model_differences(key_of(pipe, "radial")) == ["attention radial in place of stock"]
    assert key.model_differences(replace(key, model="elsewhere", weights="unknown")) == []
    karras = key_of(TinyPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)))
    assert key.model_differences(karras) == ["other settings of the scheduler"]
    older = {name: value for name, value in key.to_json().items() if name != "noise"}
    assert Key.from_json(older).model_differences(karras) == []


def test_keys_tell_strengths_of_adapters_apart(pipe: TinyPipeline) -> None:
    """Layers as those of peft: a mapping of strengths, and which of them are on."""
    keys = []
    for strength, is_off, active in (
        (1.0, False, ["x"]),
        (0.3, False, ["x"]),
        (0.3, True, ["x"]),
        (1.0, False, ["y"]),
    ):
        layer = pipe.transformer.blocks[0].attn1.to_q
        layer.scaling, layer.disable_adapters, layer.active_adapters = {"x": strength, "y": 2.0}, is_off, active
        keys.append(key_of(pipe).weights)
    assert len(set(keys)) == 4 and keys[2] == key_of(TinyPipeline()).weights


def test_runs_differ_in_what_matters(pipe: TinyPipeline) -> None:
    made = key_of(pipe).of_run(50, (21, 30, 52), (5.0, None))
    assert made.differences(made) == []
    assert made.differences(key_of(pipe).of_run(50, (21, 32, 50), (5.0, None))) == []
    other = key_of(pipe).of_run(40, (9, 45, 80), (1.0, None))
    text = made.differences(other)
    assert text[0] == "steps 40 in place of 50" and text[1] == "frames 9 in place of 21"
    assert text[2] == "guidance 1.0 in place of 5.0" and text[3].startswith("size (45, 80)")
    assert Key.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ((30, 52), (30, 52), True),
        ((30, 52), (52, 30), False),
        ((30, 52), (40, 40), False),
        ((10, 10), (11, 12), True),
        ((10, 10), (20, 20), False),
    ],
)
def test_buckets(first: tuple[int, int], second: tuple[int, int], same: bool) -> None:
    assert same_bucket(first, second) is same is same_bucket(second, first)


# ---- guards --------------------------------------------------------------------------------------------------------


def guarded(pipe: TinyPipeline, profile: Profile, strict: bool = False, **call: Any) -> None:
    """Runs once or twice with the cache of a profile under its guard."""
    with dit_accel.accelerate(pipe, cache=profile.cache()) as handle:
        remove = ProfileGuard(profile, pipe, strict=strict).attach(handle.clock)
        try:
            for _ in range(2):
                Sampler(pipe, {"num_inference_steps": 12} | call).run("a cat", 0)
        finally:
            remove()
    assert not pipe.transformer._forward_pre_hooks


def test_runs_within_the_key_pass_in_silence(pipe: TinyPipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProfileWarning)
        guarded(pipe, profile_of(pipe))
        guarded(pipe, profile_of(pipe), strict=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"guidance_scale": 3.0}, "guidance 3.0 in place of 2.0"),
        ({"num_frames": 3}, "frames 3 in place of 2"),
        ({"size": 24}, r"size \(6, 6\) in place of \(3, 3\)"),
    ],
)
def test_other_runs_are_told_once_or_refused(pipe: TinyPipeline, call: dict[str, Any], words: str) -> None:
    with pytest.warns(ProfileWarning, match=words) as told:
        guarded(pipe, profile_of(pipe), **call)
    assert len([each for each in told if each.category is ProfileWarning]) == 1
    with pytest.raises(ValueError, match=words):
        guarded(pipe, profile_of(pipe), strict=True, **call)


def test_another_number_of_steps_is_always_refused(pipe: TinyPipeline) -> None:
    dynamic = CacheSpec(12, "output", "reuse", None, 0.1)
    for spec in (SPEC, dynamic):
        with pytest.raises(ValueError, match=r"12 steps and this run has 10.*num_inference_steps=12"):
            guarded(pipe, profile_of(pipe, spec=spec), num_inference_steps=10)


def test_other_models_are_told_or_refused(pipe: TinyPipeline) -> None:
    other = TinyPipeline(FlowMatchEulerDiscreteScheduler(shift=5.0))
    with pytest.warns(ProfileWarning, match=r"shift 5\.0"):
        ProfileGuard(profile_of(pipe), other)
    with pytest.raises(ValueError, match=r"shift 5\.0"):
        ProfileGuard(profile_of(pipe), other, strict=True)


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_the_saved_profile_that_fits_is_found(pipe: TinyPipeline, tmp_path: Path) -> None:
    made = profile_of(pipe)
    others = [
        profile_of(pipe, target=Target("psnr", 32.0)),
        profile_of(pipe, target=Target("ssim", 0.9)),
        profile_of(pipe, key=replace(made.key, attention="radial")),
    ]
    for each in (made, *others):
        each.save(tmp_path / file_name(each))
    assert len(list(tmp_path.iterdir())) == 4
    assert profile_for(pipe, TARGET, folder=tmp_path).to_json() == made.to_json()
    assert profile_for(pipe, TARGET, profile=tmp_path / file_name(made)).to_json() == made.to_json()
    (tmp_path / "other.json").write_text("{}")
    with pytest.warns(ProfileWarning, match="passed over"):
        assert len(matching(tmp_path, key_of(pipe), TARGET)) == 1


def test_several_that_fit_are_told_apart_by_steps(pipe: TinyPipeline, tmp_path: Path) -> None:
    for steps in (12, 30):
        made = profile_of(pipe, key=key_of(pipe).of_run(steps, (2, 3, 3), (2.0, None)))
        made.save(tmp_path / file_name(made))
    with pytest.raises(ValueError, match=r"several profiles fit.*profile="):
        profile_for(pipe, TARGET, folder=tmp_path)
    assert profile_for(pipe, TARGET, folder=tmp_path, num_inference_steps=30).key.steps == 30


def test_a_profile_that_is_off_for_few_steps_says_nothing_of_more(pipe: TinyPipeline, tmp_path: Path) -> None:
    few = tune(pipe, target_psnr=28, prompts=PROMPTS, held_out=HELD_OUT, num_inference_steps=8)
    assert few.is_off and few.asked_steps == 8
    few.save(tmp_path / file_name(few))
    key = key_of(pipe)
    assert len(matching(tmp_path, key, TARGET, {"num_inference_steps": 8})) == 1
    assert matching(tmp_path, key, TARGET, {"num_inference_steps": 50}) == []
    assert matching(tmp_path, key, TARGET, {"num_inference_steps": 8, "force": True}) == []
    call: dict[str, Any] = {"min_speed_up": 0.01, "coverage": None, "kinds": ("listed steps",)}
    made = profile_for(pipe, TARGET, folder=tmp_path, prompts=PROMPTS, held_out=HELD_OUT, **call)
    assert made.asked_steps == 10  # the pipeline's own number


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        ({}, True),
        ({"height": 480, "width": 832, "guidance_scale": 5.0}, True),
        ({"height": 512, "width": 768}, True),
        ({"height": 720, "width": 1280}, False),
        ({"num_frames": 33}, False),
        ({"guidance_scale": 3.0}, False),
        ({"num_inference_steps": 6}, True),
        ({"num_inference_steps": 7}, False),
    ],
)
def test_saved_profiles_are_chosen_by_the_call(
    pipe: TinyPipeline, tmp_path: Path, call: dict[str, Any], fits: bool
) -> None:
    """The steps are those that were asked for, which PNDM makes one more of."""
    saved = {"height": 480, "width": 832, "num_frames": 81, "guidance_scale": 5.0}
    key = key_of(pipe).of_run(7, (2, 3, 3), (2.0, None))
    made = profile_of(pipe, key=key, settings={"call": saved, "asked_steps": 6})
    made.save(tmp_path / file_name(made))
    assert (len(matching(tmp_path, key_of(pipe), TARGET, call)) == 1) is fits
    with pytest.raises(ValueError, match="num_inference_steps=6"):
        guarded(pipe, made, num_inference_steps=10)


@pytest.mark.parametrize(
    ("call", "exact", "fits"),
    [
        ({"num_frames": 81, "height": 480}, True, True),  # which the pipeline has by itself
        ({"num_frames": 33}, False, False),
        ({"guidance_scale": 5.0}, False, True),  # where the pipeline says nothing, and may have it
        ({"guidance_scale": 5.0}, True, False),
        ({"guidance_scale": None}, True, True),
    ],
)
def test_what_a_profile_does_not_name_is_the_pipelines_own(
    pipe: TinyPipeline, tmp_path: Path, call: dict[str, Any], exact: bool, fits: bool
) -> None:
    made = profile_of(pipe, settings={"call": {}, "asked_steps": 12})
    made.save(tmp_path / file_name(made))
    defaults = {"height": 480, "width": 832, "num_frames": 81, "guidance_scale": None}
    assert (len(matching(tmp_path, key_of(pipe), TARGET, call, defaults, exact)) == 1) is fits


def test_without_a_profile_and_prompts_the_way_is_shown(
    pipe: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIT_ACCEL_PROFILES", str(tmp_path / "none"))
    assert profiles_folder() == tmp_path / "none"
    with pytest.raises(ValueError, match=r"PSNR of at least 28 dB.*prompts=\[\.\.\.\].*dit_accel\.tune"):
        profile_for(pipe, TARGET)
    with pytest.raises(ValueError, match=r"SSIM of at least 0\.9 is asked for"):
        profile_for(pipe, Target("ssim", 0.9), profile=profile_of(pipe))


def test_with_prompts_one_is_tuned_and_saved(pipe: TinyPipeline, tmp_path: Path) -> None:
    call: dict[str, Any] = {"num_inference_steps": 10, "min_speed_up": 0.01, "coverage": None}
    call["kinds"] = ("listed steps",)
    folder = tmp_path / "new" / "folder"
    made = profile_for(pipe, TARGET, folder=folder, prompts=PROMPTS, held_out=HELD_OUT, **call)
    assert made.key.steps == 10 and not made.is_off
    runs = len(pipe.calls)
    assert profile_for(pipe, TARGET, folder=folder).to_json() == made.to_json()
    asked: dict[str, Any] = {"folder": folder, "prompts": PROMPTS, "held_out": HELD_OUT} | call
    assert profile_for(pipe, TARGET, **asked, num_frames=2).to_json() == made.to_json()
    assert len(pipe.calls) == runs
    assert profile_for(pipe, TARGET, **asked, num_frames=3).key.frames == 3 and len(pipe.calls) > runs


# ---- few steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("Wan2.1-T2V-1.3B", False),
        ("wan-lightning-4steps", True),
        ("FLUX.1-schnell", True),
        ("sdxl-turbo", True),
        ("hyperion-xl", False),
        ("Hyper-SD", True),
        ("flightning", False),
        ("folder-lcm/plain-model", False),
        ("style_2000steps", False),
        ("lora-1500-steps", False),
        ("flux-8-step", True),
    ],
)
def test_names_of_distilled_models(pipe: TinyPipeline, name: str, off: bool) -> None:
    pipe.config["_name_or_path"] = name
    assert (reason_to_stay_off(pipe, 50) is not None) is off


def test_loras_and_steps(pipe: TinyPipeline) -> None:
    assert reason_to_stay_off(pipe, 9) is None and reason_to_stay_off(pipe, None) is None
    assert "8 steps" in (reason_to_stay_off(pipe, 8) or "")
    pipe.transformer.peft_config = {"my-style": None, "causvid_v2": None}
    assert "'causvid_v2'" in (reason_to_stay_off(pipe, 50) or "")
