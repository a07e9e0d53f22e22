"""Noise levels of diffusers' schedulers, against the noise that they themselves add."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch

from dit_accel.clock import StepClock
from dit_accel.noise import Level, is_pure_noise, log_snr, noise_share, read_levels

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
SCHEDULERS: list[tuple[str, dict[str, Any], bool]] = [  # class, settings, whether it is flow matching
    ("DDIMScheduler", {}, False),
    ("DDIMScheduler", ZERO_SNR, False),
    ("CogVideoXDDIMScheduler", ZERO_SNR, False),
    ("CogVideoXDPMScheduler", {}, False),
    ("DDPMScheduler", {}, False),
    ("PNDMScheduler", {"skip_prk_steps": True}, False),
    ("LCMScheduler", {}, False),
    ("EulerDiscreteScheduler", {}, False),
    ("HeunDiscreteScheduler", {}, False),
    ("KDPM2DiscreteScheduler", {}, False),
    ("KDPM2AncestralDiscreteScheduler", {}, False),
    ("DPMSolverMultistepScheduler", {}, False),
    ("DPMSolverMultistepScheduler", FLOW, True),
    ("UniPCMultistepScheduler", {}, False),
    ("UniPCMultistepScheduler", FLOW, True),
    ("EDMEulerScheduler", {"sigma_max": 0.9}, False),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}, True),
]


def make(name: str, settings: dict[str, Any]) -> Any:
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(10)
    return scheduler


def parts(scheduler: Any, step: int) -> tuple[float, float]:
    """What the scheduler multiplies signal and noise by when it adds noise for a step."""
    none, one, at = torch.zeros(1, 1), torch.ones(1, 1), scheduler.timesteps[step : step + 1]
    if type(scheduler).__name__.startswith("KDPM2"):  # it looks up the second of two levels when it adds noise
        scheduler._step_index, scheduler.sample = step, None if step % 2 == 0 else one
        scale = float(scheduler.scale_model_input(one, at))
        return scale, math.sqrt(max(1 - scale**2, 0.0))
    if hasattr(scheduler, "scale_noise"):
        return float(scheduler.scale_noise(one, at, none)), float(scheduler.scale_noise(none, at, one))
    return float(scheduler.add_noise(one, none, at)), float(scheduler.add_noise(none, one, at))


@pytest.mark.parametrize(("name", "settings", "flow"), SCHEDULERS)
def test_levels_are_those_of_the_noise_it_adds(name: str, settings: dict[str, Any], flow: bool) -> None:
    scheduler = make(name, settings)
    levels = read_levels(scheduler)
    assert [level.timestep for level in levels[: len(scheduler.timesteps)]] == scheduler.timesteps.tolist()
    assert {level.flow for level in levels} == {flow}
    for step in range(len(scheduler.timesteps)):
        signal, noise = parts(scheduler, step)
        sigma = levels[step].sigma
        assert sigma is not None
        assert noise_share(sigma, flow) == pytest.approx(noise / (signal + noise), rel=2e-3, abs=2e-6)
        if flow:
            assert sigma == pytest.approx(noise, abs=1e-5)


def test_zero_signal_at_the_first_step_is_pure_noise() -> None:
    for name in ("DDIMScheduler", "CogVideoXDDIMScheduler"):
        first, second = read_levels(make(name, ZERO_SNR))[:2]
        assert first.sigma is not None and second.sigma is not None
        assert is_pure_noise(first.sigma, first.flow) and not is_pure_noise(second.sigma, second.flow)


def test_levels_of_other_objects() -> None:
    """Nothing is made up where a scheduler says nothing; what it lists behind the last step is there as well."""

    class Bare:
        timesteps = torch.tensor([3, 2])
        alphas_cumprod = torch.tensor([0.9, 0.8])

    assert read_levels(None) == []
    assert read_levels(Bare()) == [Level(3.0, None, flow=False), Level(2.0, None, flow=False)]  # not of these alphas
    *_, last = read_levels(make("FlowMatchEulerDiscreteScheduler", {}))
    assert last == Level(None, 0.0)


def test_pure_noise_may_be_above_one_by_rounding() -> None:
    class Flow:
        timesteps = torch.tensor([1000.0, 500.0])
        sigmas = torch.tensor([1.0000001, 0.5, 0.0])

    first, second, _ = read_levels(Flow())
    assert first.flow and second.flow and first.sigma is not None and first.sigma > 1
    assert is_pure_noise(first.sigma) and log_snr(first.sigma) == log_snr(1.0)


def test_the_clock_reads_levels_anew_when_steps_are_set_anew() -> None:
    class Pipeline:
        scheduler = make("DDIMScheduler", {})

    clock = StepClock(Pipeline)
    assert clock.level(9).sigma is not None and clock.level(10) == Level(None, None)
    before = clock.level(1)
    Pipeline.scheduler.set_timesteps(20)
    assert clock.level(1) == read_levels(Pipeline.scheduler)[1] != before


def test_known_values() -> None:
    assert log_snr(0.5) == 0 == log_snr(1.0, flow=False)
    assert log_snr(0.2) == pytest.approx(math.log(4))
    assert log_snr(4.0, flow=False) == pytest.approx(-math.log(4))
    assert log_snr(1.0) == pytest.approx(-log_snr(0.0)) and math.isfinite(log_snr(0.0, flow=False))
    assert noise_share(3.0, flow=False) == 0.75 and noise_share(0.75) == 0.75
    assert is_pure_noise(1.0) and not is_pure_noise(0.999) and not is_pure_noise(100.0, flow=False)
    with pytest.raises(ValueError, match=r"from 0 to 1; got 1\.5"):
        log_snr(1.5)
