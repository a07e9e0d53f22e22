"""The clock knows step, branch, expert and generation from whatever the pipeline tells."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, PNDMScheduler
from diffusers import UniPCMultistepScheduler as UniPC

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


def sample(scheduler, timesteps, clock, scale=1.0):
    """The states of a generation with two calls a step, by any part of a scheduler's list."""
    states, latents = [], torch.ones(1, 3)
    for timestep in timesteps:
        states += [tick(clock, scale * timestep) for _ in range(2)]
        latents = scheduler.step(0.1 * latents, timestep, latents, return_dict=False)[0]
    return states


def places(states):
    """Generation, step, number of steps and branch of each."""
    return [(state.generation, state.step, state.steps, state.branch) for state in states]


def numbered(generation, steps, count):
    """What :func:`places` is to be, for these steps."""
    return [(generation, step, count, branch) for step in steps for branch in ("call0", "call1")]


SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPC(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "heun": FlowMatchHeunDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_part_of_the_timesteps_begins_at_its_place(name):
    """As in Wan's video to video, which does not tell its scheduler where it begins."""
    scheduler = SCHEDULERS[name]()
    clock = StepClock(pipe := Pipeline(scheduler=scheduler))
    for generation, strength in enumerate((5, 10, 2)):
        pipe.scheduler.set_timesteps(10)
        timesteps = scheduler.timesteps[(10 - strength) * scheduler.order :]
        count = len(scheduler.timesteps)
        steps = range(count - len(timesteps), count)
        assert places(sample(scheduler, timesteps, clock)) == numbered(generation, steps, count)


def test_a_timestep_in_thousandths_is_the_first_one():
    """As Flux has it; the list may end with a timestep that is 1."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    clock = StepClock(pipe := Pipeline(scheduler=scheduler))
    pipe.scheduler.set_timesteps(4)
    assert scheduler.timesteps[-1] == 1
    assert places(sample(scheduler, scheduler.timesteps, clock, scale=1e-3)) == numbered(0, range(4), 4)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("run", [False, True])
def test_a_scheduler_that_does_not_sample_says_nothing(name, run):
    """Another pipeline has the same model and a scheduler of its own: timesteps tell steps and generations."""
    pipe = Pipeline(scheduler=SCHEDULERS[name]())
    own, other, clock = pipe.scheduler, FlowMatchEulerDiscreteScheduler(), StepClock(pipe)
    if run:
        own.set_timesteps(4)
        sample(own, own.timesteps, clock)
    with pytest.warns(UserWarning, match="accelerate the pipeline that runs"):
        other.set_timesteps(4)
        first = sample(other, other.timesteps, clock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = []
        for _ in range(2):
            other.set_timesteps(5)
            others += sample(other, other.timesteps, clock)
        assert clock.level(0) == (None, None, True)
        own.set_timesteps(4)
        again = sample(own, own.timesteps, clock)
        assert clock.level(0).timestep == own.timesteps[0]
    if run:
        assert places(first) == numbered(1, range(4), None)
    else:  # that the scheduler stands still is known behind the first step
        assert places(first)[2:] == numbered(1, range(3), None)
    assert places(others) == numbered(2, range(5), None) + numbered(3, range(5), None)
    count = len(own.timesteps)
    assert places(again) == numbered(4, range(count), count)


def test_a_scheduler_that_stopped_halfway_says_nothing_of_other_runs():
    own, other = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()
    clock = StepClock(pipe := Pipeline(scheduler=own))
    pipe.scheduler.set_timesteps(6)
    sample(own, own.timesteps[:3], clock)
    tick(clock, own.timesteps[3]), tick(clock, own.timesteps[3])
    other.set_timesteps(5)
    with pytest.warns(UserWarning, match="accelerate the pipeline that runs"):
        assert places(sample(other, other.timesteps, clock)) == numbered(1, range(5), None)


def test_a_loop_that_steps_by_itself_along_the_schedulers_list():
    """It asks the scheduler for timesteps and sigmas, and never calls its step."""
    pipe = Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    clock = StepClock(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for generation in range(2):
            pipe.scheduler.set_timesteps(6)
            for step, timestep in enumerate(pipe.scheduler.timesteps):
                for _ in range(2):
                    state = tick(clock, timestep)
                    assert (state.generation, state.step, state.steps) == (generation, step, 6)


def test_a_copied_pipeline_has_its_own_clock(t2v):
    with dit_accel.accelerate(t2v.pipe):
        twin = copy.deepcopy(t2v.pipe)
    clock = dit_accel.acceleration_of(twin).clock
    assert clock.pipeline is twin and dit_accel.acceleration_of(twin) is not dit_accel.acceleration_of(t2v.pipe)


def test_a_schedule_that_is_gone_is_forgotten():
    pipe = Pipeline(scheduler=SimpleNamespace(timesteps=torch.tensor([900.0, 500.0, 100.0])))
    clock = StepClock(pipe)
    assert [tick(clock, timestep).step for timestep in (900, 500)] == [0, 1]
    pipe.scheduler = SimpleNamespace(timesteps=None)
    assert [(state.step, state.steps) for state in (tick(clock, 480), tick(clock, 460))] == [(2, None), (3, None)]
    assert tick(clock, 900).generation == 1


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
