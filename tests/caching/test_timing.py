"""Where the time of a call goes: marks on the host, events on a device (a fake one), and the seam that takes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.clock import StepState
from dit_accel.layout import TokenLayout
from dit_accel.timing import CallTime, EventMarks, HostMarks, Timer, TimeReport, marks_for, spent

CPU = torch.device("cpu")
LAYOUT = TokenLayout.video_only((1, 2, 2))


def state(step: int, branch: str = "cond", generation: int = 0) -> StepState:
    return StepState(generation, step, 4, branch, "transformer", 0, LAYOUT, None)


class Device:
    """A device that works through a queue: its time moves with the work given to it, not with the host's."""

    def __init__(self) -> None:
        self.queued = 0.0  # milliseconds of work
        self.waits = 0
        self.events = 0

    def work(self, milliseconds: float) -> None:
        self.queued += milliseconds

    def event(self) -> DeviceEvent:
        self.events += 1
        return DeviceEvent(self)


class DeviceEvent:
    def __init__(self, device: Device) -> None:
        self._device = device
        self.at = float("nan")
        self.is_done = False

    def record(self) -> None:
        self.at, self.is_done = self._device.queued, False

    def synchronize(self) -> None:
        self._device.waits += 1
        self.is_done = True

    def elapsed_time(self, end: DeviceEvent) -> float:
        if not end.is_done:
            raise RuntimeError("the end has not been waited for")
        return end.at - self.at


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def timer(device: Device) -> Timer:
    marks = EventMarks(device.event)
    return Timer(lambda _: marks)


def one_call(timer: Timer, device: Device, step: int, generation: int = 0) -> None:
    """2 ms outside of parts, 3 + 4 ms of attention, 5 ms of the cache."""
    timer.begin(state(step, generation=generation), CPU)
    device.work(2)
    for milliseconds in (3, 4):
        with timer.span("attention"):
            device.work(milliseconds)
    with spent(timer, "cache"):
        device.work(5)
    timer.end()


def test_events_are_read_only_in_the_report(timer: Timer, device: Device) -> None:
    one_call(timer, device, 0)
    device.work(100)  # between calls
    one_call(timer, device, 1)
    assert device.waits == 0
    report = timer.read()
    assert device.waits > 0
    for step, call in enumerate(report.calls):
        assert (call.generation, call.step, call.branch, call.expert) == (0, step, "cond", "transformer")
        assert (call.total, call.attention, call.cache) == pytest.approx((0.014, 0.007, 0.005))
        assert call.other == pytest.approx(0.002)
    assert report.split() == pytest.approx({"total": 0.028, "attention": 0.014, "cache": 0.01, "other": 0.004})


def test_a_new_generation_drops_the_times_of_the_last_and_uses_its_events_again(timer: Timer, device: Device) -> None:
    one_call(timer, device, 0)
    made = device.events
    for generation in (1, 2, 3):
        one_call(timer, device, 0, generation)
        assert [call.generation for call in timer.read().calls] == [generation]
        assert timer.read().calls[0].total == pytest.approx(0.014)  # a reused event is recorded anew
    assert device.events == made


def test_a_call_that_fails_is_closed_and_the_next_one_is_right(timer: Timer, device: Device) -> None:
    timer.begin(state(0), CPU)
    with pytest.raises(RuntimeError, match="kernel"), timer.span("attention"):
        device.work(1)
        raise RuntimeError("kernel")
    timer.end()
    one_call(timer, device, 1)
    assert [call.attention for call in timer.read().calls] == pytest.approx([0.001, 0.007])


def test_a_part_within_another_counts_for_itself_alone(timer: Timer, device: Device) -> None:
    for generation in range(3):  # marks that two spans share come back once
        timer.begin(state(0, generation=generation), CPU)
        with timer.span("cache"):
            device.work(1)
            with timer.span("cache"):
                device.work(2)
            with timer.span("attention"):
                device.work(4)
            device.work(8)
        device.work(16)
        timer.end()
        (call,) = timer.read().calls
        assert (call.cache, call.attention, call.other) == pytest.approx((0.011, 0.004, 0.016))
    assert device.events == 6


def test_parts_outside_of_calls_and_without_a_timer_are_not_timed(timer: Timer, device: Device) -> None:
    with timer.span("attention"), spent(None, "cache"):
        device.work(1)
    timer.end()
    assert timer.read() == TimeReport([], False)
    assert device.events == 0
    assert "nothing timed" in timer.read().summary()


def test_a_copy_starts_with_nothing(timer: Timer, device: Device) -> None:
    one_call(timer, device, 0)
    assert copy.deepcopy(timer).read().calls == []


def test_each_step_sums_its_branches() -> None:
    calls = [CallTime(0, s, b, "transformer", 4.0, 1.0, 0.5) for s in (0, 1) for b in ("cond", "uncond")]
    report = TimeReport(calls, True)
    assert report.by_step()[1] == {"total": 8.0, "attention": 2.0, "cache": 1.0, "other": 5.0}
    read = json.loads(json.dumps(report.to_dict()))
    assert read["steps"][0]["step"] == 0 and read["split"]["total"] == 16.0 and len(read["calls"]) == 4
    assert "attention 25.0%, cache 12.5%, other 62.5%" in report.summary()


def test_where_attention_cannot_be_told_apart_it_is_not_given_as_zero() -> None:
    report = TimeReport([CallTime(0, 0, "cond", "transformer", 4.0, 0.0, 1.0)], attention_seen=False)
    assert report.attention is None
    assert "attention is part of other" in report.summary()


def test_marks_by_device() -> None:
    assert isinstance(marks_for(CPU), HostMarks)
    assert isinstance(marks_for(torch.device("cuda:0")), EventMarks)  # makes its first event when it needs one
    with pytest.raises(ValueError, match="cpu and cuda"):
        marks_for(torch.device("mps"))


class FakeClock(HostMarks):
    """A host on which every look at the clock takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def timed(tiny_wan: Any) -> Iterator[tuple[Any, Timer]]:
    """A tiny pipeline whose sites are timed."""
    clock = FakeClock()
    timer = Timer(lambda _: clock)
    with dit_accel.accelerate(tiny_wan, "radial", dense_steps=1, dense_layers=0, block=64) as handle:
        for installed in handle._installed:
            for site in installed.sites.values():
                site.timer = timer
            before, after = installed._before_call, installed._after_call

            def begin(root: Any, state: StepState, before: Any = before) -> None:
                timer.begin(state, CPU)
                before(root, state)

            def end(root: Any, after: Any = after) -> None:
                after(root)
                timer.end()

            installed._before_call, installed._after_call = begin, end
        yield tiny_wan, timer


def render(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 3.0}
    return pipe("a red circle", **size, generator=generator, output_type="latent").frames


def test_every_site_is_timed_dense_or_sparse_and_the_picture_stays_the_same(
    timed: tuple[Any, Timer], make_tiny_wan: Any
) -> None:
    pipe, timer = timed
    with_timer = render(pipe)
    report = timer.read()
    assert [(call.step, call.branch) for call in report.calls] == [
        (0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")
    ]  # fmt: skip
    # two layers with self- and cross-attention: four spans of one look each; two marks a span, and the call's own two
    assert [call.attention for call in report.calls] == pytest.approx([0.004] * 4)
    assert [call.total for call in report.calls] == pytest.approx([0.009] * 4)
    plain = make_tiny_wan(0)
    with dit_accel.accelerate(plain, "radial", dense_steps=1, dense_layers=0, block=64):
        assert torch.equal(render(plain), with_timer)


def test_without_a_timer_dense_sites_stay_stock(tiny_wan: Any) -> None:
    with dit_accel.accelerate(tiny_wan, "radial", dense_steps=2, dense_layers=0, block=64) as handle:
        sites = [site for installed in handle._installed for site in installed.sites.values()]
        seen = []
        tiny_wan.transformer.register_forward_pre_hook(lambda *_: seen.append([site.is_stock for site in sites]))
        render(tiny_wan)
    assert seen and all(all(stock) for stock in seen)
