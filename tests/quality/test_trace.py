"""Records of dense runs: what they hold, and that replays of them are what real cached runs do."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.caching.limits import Limits
from dit_accel.caching.policies.static import Static
from dit_accel.caching.policies.transform import Transform
from dit_accel.caching.recipe import Cache
from dit_accel.caching.scopes.output import Output
from dit_accel.quality.errors import StepErrors
from dit_accel.quality.pairs import relative_error
from dit_accel.quality.replay import replay
from dit_accel.quality.sampling import Sampler, as_frames
from dit_accel.quality.trace import Trace, recording, strides_of

from .conftest import TinyPipeline

SETTINGS = {"num_inference_steps": 12}


def traced(pipe: TinyPipeline) -> tuple[Trace, torch.Tensor]:
    sampler = Sampler(pipe, SETTINGS)
    with recording(pipe) as recorder:
        latents = sampler.run("a cat", 0).latents
    return recorder.trace(latents), latents


def test_a_trace_holds_every_call_and_changes_nothing(pipe: TinyPipeline) -> None:
    stock = Sampler(pipe, SETTINGS).run("a cat", 0)
    trace, latents = traced(pipe)
    assert torch.equal(latents, stock.latents)
    assert torch.equal(Sampler(pipe, SETTINGS).run("a cat", 0).latents, latents)
    assert dit_accel.acceleration_of(pipe) is None
    places = [(call.step, call.branch, call.expert) for call in trace.calls]
    assert places == [(s, b, "transformer") for s in range(12) for b in ("cond", "uncond")]
    assert trace.steps == 12 and trace.grid == (2, 3, 3) and trace.fresh == frozenset()
    assert trace.extent == pytest.approx(float(latents.square().mean().sqrt()))
    sigmas = pipe.scheduler.sigmas.tolist()
    assert trace.strides == pytest.approx([a - b for a, b in itertools.pairwise(sigmas)])
    assert [call.sigma for call in trace.calls[::2]] == pytest.approx(sigmas[:-1])
    assert all(a.latents is b.latents for a, b in zip(trace.calls[::2], trace.calls[1::2], strict=True))
    assert trace.bytes == 12 * 3 * 4 * 4 * 2 * 6 * 6


def test_the_sampler_can_be_run_again_from_a_trace(pipe: TinyPipeline) -> None:
    trace, final = traced(pipe)
    x = trace.calls[0].latents
    for step in range(12):
        cond, uncond = trace.at_step(step)
        assert torch.allclose(cond.latents, x, atol=1e-5)
        x = x - trace.strides[step] * (uncond.output + 2 * (cond.output - uncond.output))
    assert torch.allclose(x, final, atol=1e-5)


def test_two_generations_are_two_traces(pipe: TinyPipeline) -> None:
    sampler = Sampler(pipe, SETTINGS)
    with recording(pipe) as recorder:
        sampler.run("a cat", 0)
        first = recorder.trace()
        sampler.run("a dog", 1)
        second = recorder.trace()
    assert len(first.calls) == len(second.calls) == 24
    assert not torch.equal(first.calls[0].latents, second.calls[0].latents)
    with pytest.raises(ValueError, match="was not called"):
        recorder.trace()


def test_half_precision_halves_the_bytes(pipe: TinyPipeline) -> None:
    with recording(pipe, torch.float16) as recorder:
        Sampler(pipe, SETTINGS).run("a cat", 0)
    assert recorder.trace().bytes == 12 * 3 * 2 * 4 * 2 * 6 * 6


def test_accelerated_pipelines_are_not_traced(pipe: TinyPipeline) -> None:
    with dit_accel.accelerate(pipe), pytest.raises(ValueError, match="accelerated already"), recording(pipe):
        pass


def test_replayed_decisions_are_those_of_the_engine(pipe: TinyPipeline) -> None:
    """As long as a cached run stays near the dense one, which it does until the first step that is skipped."""
    trace, _ = traced(pipe)
    for cache in (
        Cache(Output(), Static(compute_steps=(0, 2, 3, 7), steps=12), limits=Limits(cooldown=1)),
        Cache(Output(False), Transform(0.3), limits=Limits(warmup=3, cooldown=1, max_consecutive=2)),
    ):
        with dit_accel.accelerate(pipe, cache=cache) as handle:
            Sampler(pipe, SETTINGS).run("a cat", 0)
            decisions = [d for engine in handle.caches.engines for d in engine.record.decisions if d.branch == "cond"]
        real = [decision.computed for decision in decisions]
        found = replay(trace, cache)
        first = found.computed.index(False)
        assert len(real) == 12 and real[: first + 1] == list(found.computed[: first + 1])
        if isinstance(cache.policy, Static):
            assert real == list(found.computed)


def test_one_skipped_step_costs_what_the_replay_says(pipe: TinyPipeline) -> None:
    """Skipping the last step bends nothing afterwards, so the real error is the teacher-forced one."""
    trace, dense = traced(pipe)
    cache = Cache(Output(), Static(compute_steps=tuple(range(11)), steps=12))
    with dit_accel.accelerate(pipe, cache=cache):
        cached = Sampler(pipe, SETTINGS).run("a cat", 0).latents
    errors = {}
    for branch in ("cond", "uncond"):
        last, before = (next(c for c in trace.calls if (c.step, c.branch) == (s, branch)) for s in (11, 10))
        errors[branch] = before.output - before.latents + last.latents - last.output
    expected = trace.strides[11] * (errors["uncond"] + 2 * (errors["cond"] - errors["uncond"]))
    assert torch.allclose(dense - cached, expected, atol=1e-5) and float(expected.abs().max()) > 1e-4
    share = (sum(float(e.square().mean()) for e in errors.values()) / 2) ** 0.5
    assert replay(trace, cache).errors[11] == pytest.approx(trace.strides[11] * share, rel=1e-4)
    assert relative_error(cached, dense) > 0 and StepErrors(trace, cache.predictor, True)((10,), 11) > 0


def test_strides_come_from_noise_levels_where_there_are_any() -> None:
    assert strides_of([1.0, 0.6, 0.1], 3) == pytest.approx((0.4, 0.5, 0.1))
    assert strides_of([1.0, 0.6, 0.1, 0.0], 3) == pytest.approx((0.4, 0.5, 0.1))
    assert strides_of([], 4) == (0.25,) * 4


def test_strides_of_diffusion_models_go_by_what_they_predict() -> None:
    """By hand: one step of DDIM whose output is off by one, in latents over ``alpha``."""
    sigmas = [40.0, 3.0, 0.5]
    for predicts in ("epsilon", "v_prediction", "sample"):
        found = strides_of(sigmas, 3, predicts)
        for here, after, stride in zip(sigmas, [3.0, 0.5, 0.0], found, strict=True):
            alpha, noise = 1 / math.hypot(1, here), here / math.hypot(1, here)
            signal_off = {"epsilon": -noise / alpha, "v_prediction": -noise, "sample": 1.0}[predicts]
            noise_off = {"epsilon": 1.0, "v_prediction": alpha, "sample": -alpha / noise}[predicts]
            assert stride == pytest.approx(abs(signal_off + after * noise_off), rel=1e-9)


def test_calls_at_one_level_share_the_way_to_the_next() -> None:
    assert strides_of([1.0, 0.6, 0.6, 0.1], 4) == pytest.approx((0.4, 0.25, 0.25, 0.1))


def test_guidance_is_what_it_was_when_the_generation_began(
    pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipelines with a dynamic scale overwrite it at every step."""
    step = pipe.scheduler.step

    def after(*args: Any, **options: Any) -> Any:
        pipe._guidance_scale = 1.1
        return step(*args, **options)

    monkeypatch.setattr(pipe.scheduler, "step", after)
    trace, _ = traced(pipe)
    assert trace.guidance == (2.0, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": "x"}, "prompt cannot be given"),
        ({"output_type": "np", "seed": 3}, "output_type cannot"),
        ({"step_count": 3}, "takes no step_count"),
    ],
)
def test_settings_of_the_call_are_checked(pipe: TinyPipeline, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampler(pipe, settings)


def test_frames_of_videos_and_images() -> None:
    assert as_frames(torch.rand(1, 5, 3, 4, 4)).shape == (5, 3, 4, 4)
    assert as_frames(torch.rand(1, 3, 4, 4).half()).dtype == torch.float32
    for wrong in (torch.rand(2, 3, 4, 4), torch.rand(1, 4, 4, 3), None):
        with pytest.raises(ValueError, match="one video"):
            as_frames(wrong)
    with pytest.raises(ValueError, match="NaN"):
        as_frames(torch.full((1, 3, 2, 2), torch.nan))
