"""Steps placed by log signal-to-noise ratio, against plain loops, and what that gains on a trained model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    WanPipeline,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dit_accel
from dit_accel.caching import Cache
from dit_accel.caching.policies import Interval, Judge, SnrGap
from dit_accel.caching.predictors import Kept, Place, Reuse, Settled, Taylor
from dit_accel.caching.predictors.taylor import Along
from dit_accel.caching.presets.snr_gap import PACE, snr_gap
from dit_accel.noise import Level, read_levels
from dit_accel.shapes import path

from ..seams.conftest import Subject, build_image_subject, build_subject
from .sequences import RANDOM, UNIT, decisions, forced_steps, sights


def flow_levels(steps: int, shift: float) -> list[float]:
    """What a sampler of flow matching lists, from pure noise on."""
    return [shift * (1 - s / steps) / (1 + (shift - 1) * (1 - s / steps)) for s in range(steps)]


def computed_steps(
    levels: list[float], threshold: float, pace: float = 0.0, forced: frozenset[int] = frozenset()
) -> list[int]:
    """The rule in words of its own: how much noise over signal has fallen, and how much time has passed."""
    found, odds = [0], 2 * levels[1] / (1 - levels[1])
    for step in range(1, len(levels)):
        now = levels[step] / (1 - levels[step])
        far = odds / now * math.exp(pace * (step - found[-1]) / len(levels)) >= math.exp(threshold)
        if step in forced or far:
            odds = now
            found.append(step)
    return found


@RANDOM
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(3, 60),
    shift=st.floats(0.5, 15),
    threshold=st.floats(0.05, 4),
    pace=st.sampled_from((0.0, 5.0, 20.0)),
)
def test_steps_are_computed_where_noise_fell_enough(
    seed: int, steps: int, shift: float, threshold: float, pace: float
) -> None:
    levels, forced = flow_levels(steps, shift), forced_steps(seed, steps) - {0}
    found = decisions(SnrGap(threshold, pace).judge(UNIT, steps), sights(steps, sigma=levels), forced)
    assert [step for step, computes in enumerate(found) if computes] == computed_steps(levels, threshold, pace, forced)
    listed = [Level(None, level) for level in levels]
    assert list(SnrGap(threshold, pace).computed_steps(listed)) == computed_steps(levels, threshold, pace)


def test_noise_that_is_added_has_no_pure_noise() -> None:
    levels = [8.0, 4.0, 2.1, 1.0, 0.4, 0.1]
    seen, policy = sights(6, sigma=levels, flow=[False] * 6), SnrGap(math.log(2) - 1e-9)
    assert decisions(policy.judge(UNIT, 6), seen, frozenset()) == [True, True, False, True, True, True]
    assert policy.computed_steps([Level(None, level, flow=False) for level in levels]) == (0, 1, 3, 4, 5)
    assert policy.computed_steps([Level(None, level, flow=False) for level in (1e6, 4.0, 2.1)]) == (0, 1)
    with pytest.raises(ValueError, match="neither sigmas nor alphas"):
        decisions(SnrGap(0.5).judge(UNIT, 6), sights(6), frozenset())
    for bad in ({"threshold": -0.1}, {"threshold": 1, "pace": -1}):
        with pytest.raises(ValueError, match="from 0"):
            SnrGap(**bad)
    assert isinstance(SnrGap(0.5).judge(UNIT, None), Judge)
    with pytest.raises(ValueError, match="by the number of steps"):
        SnrGap(0.5, pace=1).judge(UNIT, None)


def test_tightened_it_computes_more() -> None:
    levels = flow_levels(40, 5)
    judge = SnrGap(1.0).judge(UNIT, 40)
    judge.tighten(0.5)
    found = decisions(judge, sights(40, sigma=levels), frozenset())
    assert [step for step, computes in enumerate(found) if computes] == computed_steps(levels, 0.5)


def test_what_the_docs_say_of_50_steps() -> None:
    """The counts in the docstring of the preset, and the list in the docs."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    scheduler.set_timesteps(50)
    levels = read_levels(scheduler)[:50]

    def computed(threshold: float) -> list[int]:
        return list(SnrGap(threshold, PACE).computed_steps(levels))

    assert [len(computed(threshold)) for threshold in (1.4, 1.7, 2.2, 2.6, 3.6)] == [15, 13, 10, 9, 7]
    assert computed(2.2) == [0, 3, 8, 14, 20, 26, 32, 38, 44, 48]


def kept_along(steps: list[int], levels: list[float], value: Callable[[int], Tensor]) -> list[Kept]:
    """Newest first."""
    return [Kept(Place(step, levels[step], len(levels)), value(step)) for step in reversed(steps)]


def as_added(place: Place) -> Place:
    """The same ratio of signal to noise where noise is added to the signal."""
    assert place.sigma is not None
    return replace(place, sigma=place.sigma / (1 - place.sigma), flow=False)


@RANDOM
@given(seed=st.integers(0, 10**6))
def test_lines_along_log_snr_are_met(seed: int) -> None:
    draw = random.Random(seed)
    levels = flow_levels(30, draw.uniform(1, 12))
    older, newer, skipped = sorted(draw.sample(range(1, 30), 3))
    slope, start = torch.randn(2, 1, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def value(step: int) -> Tensor:
        return start + slope * math.log(1 / levels[step] - 1)

    kept = kept_along([older, newer], levels, value)
    line = Taylor(1, "log_snr", kappa=None)
    found = line.predict(kept, Place(skipped, levels[skipped], 30))
    torch.testing.assert_close(found, value(skipped), rtol=1e-9, atol=1e-9)
    added = [replace(each, place=as_added(each.place)) for each in kept]
    found = line.predict(added, as_added(Place(skipped, levels[skipped], 30)))
    torch.testing.assert_close(found, value(skipped), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="flow matching has noise levels from 0 to 1"):
        Taylor(1, "log_snr").predict(kept, Place(skipped, 1.5, 30))


def test_settled_draws_no_line_through_first_steps() -> None:
    levels = flow_levels(20, 3)
    value = {
        0: torch.tensor([9.0]),
        1: torch.tensor([1.0]),
        3: torch.tensor([2.0]),
        5: torch.tensor([4.0]),
    }.__getitem__
    line, here = Settled(Taylor(1, kappa=None), 0.1), Place(7, levels[7], 20)
    assert line.depth == 2 and line.lowered() == Settled(Reuse(), 0.1)
    assert float(line.predict(kept_along([0, 1], levels, value), here)) == 1  # both are of the first tenth
    assert float(line.predict(kept_along([1, 3], levels, value), here)) == 2  # one of them
    assert float(line.predict(kept_along([3, 5], levels, value), here)) == 6
    assert float(Settled(Taylor(1, kappa=None), 4).predict(kept_along([3, 5], levels, value), here)) == 4
    assert Settled(Reuse()).lowered() is None
    with pytest.raises(ValueError, match="nobody says how many steps"):
        line.predict(kept_along([3, 5], levels, value), Place(7, levels[7]))
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="after"):
            Settled(Taylor(1), bad)


@pytest.fixture(scope="module")
def wan(make_tiny_wan: Callable[[int], Any]) -> Subject:
    subject = build_subject(make_tiny_wan, "t2v")
    subject.inputs["num_inference_steps"] = 12
    return subject


@pytest.mark.parametrize(("order", "along"), [(0, "step"), (1, "step"), (1, "log_snr")])
def test_the_preset_is_the_plain_loop(wan: Subject, order: int, along: Along) -> None:
    """Every output of the model, of both branches."""
    outputs: list[Tensor] = []
    cache = snr_gap(threshold=2.0, pace=6.0, order=order, settle=2, along=along)
    with dit_accel.accelerate(wan.pipe, cache=cache) as handle:
        hook = wan.root.register_forward_hook(lambda _root, _args, output: outputs.append(output[0].clone()))
        wan.run()
        hook.remove()
        record = handle.caches.engines[0].record.decisions
    levels = [float(level) for level in wan.pipe.scheduler.sigmas[:12]]
    wanted = computed_steps(levels, 2.0, 6.0)
    assert {each.step for each in record if each.computed} == {*wanted} and 3 < len(wanted) < 10

    def place(step: int) -> float:
        return step if along == "step" else math.log(1 / levels[step] - 1)

    for step in {*range(12)} - {*wanted}:
        known = [each for each in wanted if each < step]
        late = [each for each in known if each >= 2]
        for branch in (0, 1):
            value = outputs[2 * known[-1] + branch]
            if order and len(late) > 1:
                rate = (place(step) - place(late[-1])) / (place(late[-1]) - place(late[-2]))
                value = value + rate * (value - outputs[2 * late[-2] + branch])
            torch.testing.assert_close(outputs[2 * step + branch], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_schedulers_of_diffusion_have_noise_levels_too(scheduler: Any) -> None:
    """On a UNet; computed steps are those that the rule in words of its own finds in the scheduler's own alphas."""
    subject = build_image_subject("sd15")
    subject.pipe.scheduler = scheduler.from_config(subject.pipe.scheduler.config, skip_prk_steps=True)
    subject.inputs["num_inference_steps"] = 12
    with dit_accel.accelerate(subject.pipe, cache="snr_gap", cache_settings={"threshold": 2.0, "pace": 4.0}) as handle:
        found = subject.run()
        record = handle.caches.engines[0].record.decisions
    alphas = subject.pipe.scheduler.alphas_cumprod[subject.pipe.scheduler.timesteps.long()]
    shares = [float(((1 - alpha) / alpha).sqrt() / (1 + ((1 - alpha) / alpha).sqrt())) for alpha in alphas]
    odds = {step: shares[step] / (1 - shares[step]) for step in range(len(shares))}
    wanted = [0]
    for step in range(1, len(shares)):
        if odds[wanted[-1]] / odds[step] * math.exp(4.0 * (step - wanted[-1]) / len(shares)) >= math.exp(2.0):
            wanted.append(step)
    assert [each.step for each in record if each.computed] == wanted and 3 < len(wanted) < len(shares) - 2
    assert [each.step for each in record] == list(range(len(shares))) and bool(torch.isfinite(found).all())


def test_it_refuses_orders_that_it_has_not() -> None:
    for bad in (2, True):
        with pytest.raises(ValueError, match="order is 0 or 1"):
            snr_gap(order=bad)


@torch.no_grad()
def test_on_a_trained_model_it_is_nearer_to_dense_than_equal_intervals() -> None:
    """With no more computed steps, by both predictors."""
    pipe = WanPipeline.from_pretrained(path("shapes-wan"))
    pipe.set_progress_bar_config(disable=True)
    steps, call = 30, {"height": 128, "width": 128, "num_frames": 5, "guidance_scale": 3.0, "output_type": "latent"}

    def latents() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        prompt = "a red circle moving right on a gray background"
        frames: Tensor = pipe(prompt, num_inference_steps=steps, generator=generator, **call).frames
        return frames

    def off(cache: Cache) -> tuple[float, int]:
        with dit_accel.accelerate(pipe, cache=cache) as handle:
            found = latents()
            computed = {each.step for each in handle.caches.engines[0].record.decisions if each.computed}
        return float((found - dense).square().mean()), len(computed)

    dense = latents()
    for order in (0, 1):
        ours, count = off(snr_gap(order=order))
        theirs, more = off(replace(snr_gap(order=order), policy=Interval(4, 1)))
        assert count <= more < steps / 3 + 1
        assert 2 * ours < theirs
