"""``accelerate()`` with a quality target: which cache it puts on, what it refuses."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.caching import Anchor
from dit_accel.processors import CompensatedAttnProcessor, RadialAttnProcessor
from dit_accel.quality import ProfileWarning
from dit_accel.quality.key import key_of
from dit_accel.quality.matching import FOLDER
from dit_accel.quality.request import attention_of, settled

from .conftest import HELD_OUT, PROMPTS, TinyPipeline
from .test_profile import profile_of


def run(pipe: TinyPipeline, **call: Any) -> torch.Tensor:
    given: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 12, "return_dict": False} | call
    found: torch.Tensor = pipe(**given, generator=torch.Generator().manual_seed(0))[0]
    return found


def test_a_target_puts_on_the_cache_of_its_saved_profile(
    pipe: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    profile_of(pipe).save(tmp_path / "p.json")
    stock = run(pipe)
    with dit_accel.accelerate(pipe, target_psnr=28) as handle:
        found = run(pipe)
        assert handle.profile is not None and handle.profile.target.value == 28
        assert handle.report().caches[0].computed_steps["transformer"]["cond"] == [0, 1, 4, 8]
        with pytest.raises(ValueError, match="12 steps"):
            run(pipe, num_inference_steps=9)
    assert not torch.equal(found, stock) and torch.equal(run(pipe), stock)
    assert torch.isfinite(run(pipe, num_inference_steps=9)).all()  # nobody watches any more


def test_what_is_tuned_for_a_target_is_saved_and_found_again(
    pipe: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    call = {"num_inference_steps": 11, "min_speed_up": 0.01, "coverage": None, "kinds": ("listed steps",)}
    asked: dict[str, Any] = {"target_psnr": 28, "prompts": PROMPTS, "held_out": HELD_OUT, "call": call}
    stock = run(pipe, num_inference_steps=11)
    with dit_accel.accelerate(pipe, **asked) as handle:
        tuned = handle.profile
        assert tuned is not None and not tuned.is_off and tuned.key.steps == 11
        assert not torch.equal(run(pipe, num_inference_steps=11), stock)
    assert len(list(tmp_path.glob("*.json"))) == 1
    made = len(pipe.calls)
    with dit_accel.accelerate(pipe, **asked) as handle:
        assert handle.profile is not None and handle.profile.spec == tuned.spec
    assert len(pipe.calls) == made


def test_a_profile_is_taken_from_its_file_or_as_it_is(pipe: TinyPipeline, tmp_path: Path) -> None:
    profile = profile_of(pipe)
    path = profile.save(tmp_path / "p.json")
    for given in (profile, path, str(path)):
        with dit_accel.accelerate(pipe, profile=given) as handle:
            assert handle.caches.engines[0].cache == profile.cache()


def test_a_profile_that_is_off_runs_dense_and_says_so(pipe: TinyPipeline) -> None:
    with (
        pytest.warns(ProfileWarning, match="too slow"),
        dit_accel.accelerate(pipe, profile=profile_of(pipe, spec=None, reason="too slow")) as handle,
    ):
        assert not handle.caches.engines


def test_strict_refuses_what_was_not_measured(pipe: TinyPipeline) -> None:
    with (
        dit_accel.accelerate(pipe, profile=profile_of(pipe), strict=True),
        pytest.raises(ValueError, match="guidance"),
    ):
        run(pipe, guidance_scale=5.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_psnr": 28, "target_ssim": 0.9}, "exactly one"),
        ({"target_psnr": 28, "cache": "easycache"}, "leave cache out"),
        ({"profile": "nowhere.json", "cache": "easycache"}, "leave cache out"),
        ({"prompts": ["a", "b"]}, "belong to a quality target"),
        ({"call": {"num_inference_steps": 12}}, "belong to a quality target"),
        ({"target_psnr": 30}, "no profile"),
        ({"profile": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_what_does_not_fit_is_refused(
    pipe: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(ValueError, match=message):
        dit_accel.accelerate(pipe, **given)
    assert dit_accel.acceleration_of(pipe) is None


def test_a_bare_model_has_no_quality(pipe: TinyPipeline) -> None:
    with pytest.raises(ValueError, match="give the pipeline"):
        dit_accel.accelerate(pipe.transformer, profile=profile_of(pipe))


def test_a_profile_that_is_off_is_dense_at_any_number_of_steps(pipe: TinyPipeline) -> None:
    profile = profile_of(pipe, spec=None, reason="too slow")
    stock = run(pipe, num_inference_steps=9)
    with (
        pytest.warns(ProfileWarning, match="too slow"),
        dit_accel.accelerate(pipe, profile=profile, strict=True) as handle,
    ):
        assert handle.profile is profile
        assert torch.equal(run(pipe, num_inference_steps=9), stock)


def test_sparse_attention_that_kept_no_target_is_left_out(pipe: TinyPipeline) -> None:
    stock = run(pipe)
    few = profile_of(pipe, spec=None, reason="8 steps are too few")  # nothing was run beside the method
    with pytest.warns(ProfileWarning, match="too few"), dit_accel.accelerate(pipe, "compensated", profile=few) as kept:
        assert kept.processor is not None
    missed = profile_of(pipe, spec=None, reason="too far off", candidates=({"cache": "x", "verdict": "below target"},))
    with pytest.warns(ProfileWarning) as told:
        handle = dit_accel.accelerate(pipe, "compensated", profile=missed)
    assert any("attention stays dense as well" in str(each.message) for each in told)
    with handle:
        assert handle.processor is None and torch.equal(run(pipe), stock)


def test_a_refused_profile_leaves_the_pipeline_as_it_was(pipe: TinyPipeline) -> None:
    other = profile_of(pipe)
    other = replace(other, key=replace(other.key, scheduler="Other"))
    with pytest.raises(ValueError, match="scheduler"):
        dit_accel.accelerate(pipe, profile=other, strict=True)
    assert dit_accel.acceleration_of(pipe) is None
    dit_accel.accelerate(pipe, profile=profile_of(pipe)).remove()


def test_a_method_is_the_same_however_it_is_named(pipe: TinyPipeline) -> None:
    given: dict[str, Any] = {"attention": "radial", "block": 64, "preset": None}
    key = key_of(pipe, attention_of(settled(pipe, given))).of_run(12, (2, 3, 3), (2.0, None))
    profile = replace(profile_of(pipe), key=key)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProfileWarning)
        same: list[dict[str, Any]] = [{"attention": RadialAttnProcessor(block=64)}, given]
        for beside in same:
            dit_accel.accelerate(pipe, profile=profile, strict=True, **beside).remove()
    others: list[dict[str, Any]] = [{}, given | {"block": 128}, given | {"anchor": Anchor()}]
    for beside in others:
        with pytest.warns(ProfileWarning, match="attention"):
            dit_accel.accelerate(pipe, profile=profile, **beside).remove()


def test_tuning_knows_no_controls(pipe: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(ValueError, match="token_order"):
        dit_accel.accelerate(
            pipe, target_psnr=28, prompts=["a", "b"], held_out=["c", "d"], token_order=lambda *_: None
        )
    assert not pipe.calls


def test_attention_under_a_tuned_cache_is_not_replaced(pipe: TinyPipeline) -> None:
    with dit_accel.accelerate(pipe, profile=profile_of(pipe)) as handle:
        with pytest.raises(ValueError, match="tuned for a quality target"):
            pipe.transformer.set_attn_processor(CompensatedAttnProcessor())
        assert dit_accel.acceleration_of(pipe) is handle
