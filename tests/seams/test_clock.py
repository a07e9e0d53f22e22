"""The clock knows step, branch, expert and generation from whatever the pipeline tells."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import PNDMScheduler

import dit_accel
from dit_accel.clock import StepClock
from dit_accel.layout import TokenLayout

LAYOUT = TokenLayout.video_only((3, 2, 2))


class Watch(dit_accel.AttentionControl):
    """Notes the state of every call at the first self-attention of each root."""

    def __init__(self):
        super().__init__(layers=[0])
        self.states = []

    def record(self, call, query, key, value, output):
        self.states.append(call.state)


def watch(subject, **changes):
    control = Watch()
    with dit_accel.accelerate(subject.pipe, controls=[control]):
        subject.run(**changes)
    return control.states


def test_steps_branches_and_ordinals(subject):
    states = watch(subject)
    assert [state.step for state in states] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [state.branch for state in states] == ["cond", "uncond"] * 4
    assert [state.ordinal for state in states] == list(range(8))
    assert {state.steps for state in states} == {4}
    assert {state.layout for state in states} == {LAYOUT}


def test_two_experts_share_one_clock(two_experts):
    experts = [state.expert for state in watch(two_experts)]
    switch = experts.index("transformer_2")
    assert 0 < switch < 8
    assert set(experts[:switch]) == {"transformer"} and set(experts[switch:]) == {"transformer_2"}


def test_without_guidance_there_is_one_branch(t2v):
    assert [state.branch for state in watch(t2v, guidance_scale=1.0)] == ["cond"] * 4


def test_each_generation_starts_anew(t2v):
    control = Watch()
    with dit_accel.accelerate(t2v.pipe, controls=[control]):
        t2v.run()
        t2v.run(num_inference_steps=2, num_frames=5)
    assert [state.generation for state in control.states] == [0] * 8 + [1] * 4
    assert [state.step for state in control.states[8:]] == [0, 0, 1, 1]
    assert control.states[-1].steps == 2 and control.states[-1].layout.grid == (2, 2, 2)


def test_one_step_generations_are_told_apart_without_a_scheduler(t2v):
    control = Watch()
    with dit_accel.accelerate(t2v.pipe.transformer, controls=[control]):
        t2v.run(num_inference_steps=1)
        t2v.run(num_inference_steps=1)
    assert [(state.generation, state.step) for state in control.states] == [(0, 0), (0, 0), (1, 0), (1, 0)]


def test_a_window_of_steps_and_a_branch_select_calls(t2v):
    recorder = dit_accel.AttentionMassRecorder(4, steps=(1, 3), branches=["uncond"], layers=[1], kinds=["cross"])
    with dit_accel.accelerate(t2v.pipe, controls=[recorder]):
        t2v.run()
    assert list(recorder.masses) == [("transformer", "blocks.1.attn2", step, "uncond") for step in (1, 2)]


def tick(clock, timestep, layout=LAYOUT, expert="transformer"):
    return clock.tick(expert, layout, {"timestep": torch.tensor([float(timestep)])})


def test_timesteps_alone():
    clock = StepClock()
    states = [tick(clock, timestep) for timestep in (900, 900, 500, 500, 100, 100, 900)]
    assert [state.step for state in states] == [0, 0, 1, 1, 2, 2, 0]
    assert [state.branch for state in states] == ["call0", "call1"] * 3 + ["call0"]
    assert [state.generation for state in states] == [0] * 6 + [1]
    assert states[0].steps is None


class Pipeline(SimpleNamespace):
    """Stands for a pipeline; unlike its base it can be referred to weakly."""


def test_a_scheduler_without_a_counter_is_looked_up():
    pipeline = Pipeline(scheduler=SimpleNamespace(timesteps=torch.tensor([900.0, 500.0, 100.0])))
    clock = StepClock(pipeline)
    assert [tick(clock, timestep).step for timestep in (900, 500, 500, 100)] == [0, 1, 1, 2]
    pipeline.scheduler.timesteps = pipeline.scheduler.timesteps.clone()
    state = tick(clock, 900)
    assert (state.generation, state.step, state.steps) == (1, 0, 3)


def test_a_second_order_scheduler_counts_its_own_sub_steps():
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 900.0, 500.0]), step_index=None, begin_index=None)
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    steps = []
    for index, timestep in ((None, 900), (1, 900), (2, 500)):
        scheduler.step_index = index
        steps.append(tick(clock, timestep).step)
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("skip", [True, False])
def test_steps_of_a_timestep_that_is_listed_twice(skip):
    """PNDM, which keeps no index of its steps, by two branches of guidance, twice over."""
    pipe = Pipeline(scheduler=PNDMScheduler(skip_prk_steps=skip))
    clock, sample = StepClock(pipe), torch.ones(1, 3)
    for generation in range(2):
        pipe.scheduler.set_timesteps(6)
        timesteps = pipe.scheduler.timesteps
        assert len(timesteps.unique()) < len(timesteps)
        for step, timestep in enumerate(timesteps):
            for branch in ("call0", "call1"):
                state = tick(clock, timestep)
                assert (state.generation, state.step, state.branch) == (generation, step, branch)
            sample = pipe.scheduler.step(0.1 * sample, timestep, sample).prev_sample


def test_explicit_steps_win():
    clock = StepClock()
    clock.push_context("cond", 7, 9)
    clock.set_step(3, 5, "source")
    state = tick(clock, 900)
    assert (state.step, state.steps, state.branch) == (3, 5, "source")
    clock.set_step(None)
    assert tick(clock, 800).step == 7
    with pytest.raises(ValueError, match="counts from 0"):
        clock.set_step(-1)


def test_reset_starts_a_generation():
    clock = StepClock()
    tick(clock, 900)
    clock.reset()
    assert tick(clock, 500).generation == 1


def test_a_new_grid_is_a_new_generation():
    clock = StepClock()
    tick(clock, 900)
    assert tick(clock, 900, TokenLayout.video_only((1, 2, 2))).generation == 1


def test_no_timestep_no_guess():
    clock = StepClock()
    clock.tick("model", LAYOUT, {})
    with pytest.raises(ValueError, match="set_step"):
        clock.tick("model", LAYOUT, {})
