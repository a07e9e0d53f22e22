"""Presets that follow a policy, on tiny pipelines: strict ones change no bit, generous ones reuse all they may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.caching.limits import Limits
from dit_accel.caching.policies import Transform
from dit_accel.caching.presets import preset_by_name
from dit_accel.caching.recipe import Cache

from ..seams.conftest import Subject, build_subject, build_video_subject

STEPS = 8
LINEAR = {"coefficients": (1.0, 0.0)}
SETTINGS: dict[str, dict[str, Any]] = {
    "dbcache": {"front": 1},
    "dicache": {},
    "easycache": {},
    "fbcache": {},
    "magcache": {"ratios": (1.0, *([0.99] * (STEPS - 1))), "max_skips": 99},
    "prune": {"front": 0, "dynamic": True},
    "seacache": {},
    "snr_gap": {},
    "teacache": LINEAR,
}


@pytest.fixture(scope="module")
def wan(make_tiny_wan: Callable[[int], Any]) -> Subject:
    """Text to video with two calls a step."""
    subject = build_subject(make_tiny_wan, "t2v")
    subject.inputs["num_inference_steps"] = STEPS
    return subject


@pytest.fixture(scope="module")
def stock(wan: Subject) -> torch.Tensor:
    return wan.run()


def with_threshold(name: str, threshold: float, root: Any, **more: Any) -> Cache:
    """A preset with one warm-up step and no other limit."""
    found = preset_by_name(name, root, SETTINGS[name] | {"threshold": threshold} | more)
    assert isinstance(found, Cache)
    return replace(found, limits=Limits(warmup=1))


def run(subject: Subject, cache: Cache) -> tuple[torch.Tensor, list[Any]]:
    """Latents, and what was decided for the first branch."""
    with dit_accel.accelerate(subject.pipe, cache=cache) as handle:
        latents = subject.run()
        decisions = handle.caches.engines[0].record.decisions
    return latents, [each for each in decisions if each.branch == decisions[0].branch]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_threshold_of_zero_changes_no_bit(wan: Subject, stock: torch.Tensor, name: str) -> None:
    found, decisions = run(wan, with_threshold(name, 0.0, wan.root))
    assert torch.equal(found, stock)
    assert {each.step for each in decisions} == set(range(STEPS))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_generous_threshold_reuses_all_that_limits_allow(wan: Subject, stock: torch.Tensor, name: str) -> None:
    found, decisions = run(wan, with_threshold(name, 1e9, wan.root))
    assert not torch.equal(found, stock) and bool(torch.isfinite(found).all())
    first = 2 if name == "easycache" else 1  # its rate needs two computed steps
    assert {each.step for each in decisions if not each.computed} == set(range(first, STEPS))
    assert all(each.value is not None for each in decisions if not each.computed)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_second_run_decides_the_same(wan: Subject, name: str) -> None:
    """Nothing that a judge remembers outlives its generation."""
    cache = with_threshold(name, 0.1, wan.root)
    latents, numbers = [], []
    with dit_accel.accelerate(wan.pipe, cache=cache) as handle:
        for seed in (1, 5, 1):
            latents.append(wan.run(seed=seed))
            decisions = handle.caches.engines[0].record.decisions
            last = decisions[-1].generation
            numbers.append([(d.step, d.branch, d.computed, d.value) for d in decisions if d.generation == last])
    assert torch.equal(latents[0], latents[2]) and numbers[0] == numbers[2]
    assert not torch.equal(latents[0], latents[1])


@pytest.mark.parametrize(
    "settings", [{"mask": (1, 0, 0, 1, 0, 0, 0, 1)}, {"compute_steps": (0, 3, 7)}, {"mask": "ultra"}]
)
def test_lists_of_steps_are_followed(wan: Subject, settings: dict[str, Any]) -> None:
    cache = preset_by_name("static", None, settings)
    assert isinstance(cache, Cache)
    _, decisions = run(wan, cache)
    expected = [0, 1, 4, 7] if settings == {"mask": "ultra"} else [0, 3, 7]
    assert [each.step for each in decisions if each.computed] == expected


def test_a_list_for_other_steps_is_refused_at_the_first_call(wan: Subject) -> None:
    handle = dit_accel.accelerate(wan.pipe, cache="static", cache_settings={"mask": (1, 0, 1)})
    with handle, pytest.raises(ValueError, match="made for 3 steps, and this run has 8 steps"):
        wan.run()


def test_teacache_on_wan_is_a_list_of_steps_in_disguise(wan: Subject) -> None:
    """Its signal depends on the timestep alone, so other prompts and noise have the same numbers."""
    cache = with_threshold("teacache", 0.5, wan.root)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        inputs = dict(wan.inputs, prompt_embeds=torch.randn(1, 16, 64))
        with dit_accel.accelerate(wan.pipe, cache=cache) as handle:
            Subject(wan.pipe, inputs).run(seed=seed)
            decisions = handle.caches.engines[0].record.decisions
            values.append([(each.step, each.computed, each.value) for each in decisions])
    assert values[0] == values[1]
    assert len({computed for _, computed, _ in values[0]}) == 2


@pytest.mark.parametrize("name", ["seacache", "snr_gap", "dicache", "teacache", "easycache"])
def test_cogvideox_with_frames_before_channels(name: str) -> None:
    """Its scheduler lists no sigmas."""
    subject = build_video_subject("cogvideox")
    subject.inputs["num_inference_steps"] = 4
    cache = with_threshold(name, 1e9, subject.root)
    found, decisions = run(subject, cache)
    assert bool(torch.isfinite(found).all())
    assert any(not each.computed for each in decisions)


def test_easycache_may_be_combined_with_a_mask(wan: Subject) -> None:
    from dit_accel.caching.policies import Static

    cache = with_threshold("easycache", 1e9, wan.root)
    _, decisions = run(wan, replace(cache, policy=Transform(1e9) | Static(mask=(0, 0, 0, 0, 1, 0, 0, 0))))
    assert [each.step for each in decisions if each.computed] == [0, 1, 4]
