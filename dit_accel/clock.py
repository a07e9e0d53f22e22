"""Which step of which generation is running, on which branch of guidance: one clock per pipeline.

A call of the root model never says which sampling step it belongs to, so the clock puts it together from what is
there, in this order of trust: an explicit :meth:`StepClock.set_step`, the context diffusers gives (``cache_context``),
the pipeline's scheduler, the ``timestep`` argument. It never counts calls to guess parity.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .layout import TokenLayout
from .noise import Level, read_levels

_CLOSE = 1e-4  # by which a timestep may be off one in the list, as a part of the largest there


@dataclass(frozen=True)
class StepState:
    """One call of a root model.

    Attributes:
        generation: counts generations since installation, from 0.
        step: index of the sampling step within the generation, from 0.
        steps: number of sampling steps, or None where nobody says (a bare transformer without a scheduler).
        branch: ``"cond"``, ``"uncond"`` and the like where the pipeline names it, else ``"call0"``, ``"call1"`` ... in
            the order of calls within the step. A batched guidance call is one branch.
        expert: attribute name of the root in its pipeline, such as ``"transformer_2"``.
        ordinal: root calls in this generation so far.
        layout: where the tokens are.
        timestep: the ``timestep`` argument as given; reading its value waits for the device.
    """

    generation: int
    step: int
    steps: int | None
    branch: str
    expert: str
    ordinal: int
    layout: TokenLayout
    timestep: torch.Tensor | None


@dataclass
class _Context:
    """What ``cache_context`` said about the calls inside it."""

    name: str | None = None
    step: int | None = None
    steps: int | None = None


class StepClock:
    """Turns root calls into :class:`StepState`; resets itself at the start of each generation.

    Args:
        pipeline: the pipeline whose scheduler may be read; None for a bare model. Only a weak reference is kept.
    """

    def __init__(self, pipeline: Any | None = None) -> None:
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self._contexts: list[_Context] = []
        self._explicit = _Context()
        self._generation = -1
        self._last_step: int | None = None
        self._last_timestep: torch.Tensor | None = None
        self._last_grid: tuple[int, int, int] | None = None
        self._ordinal = 0
        self._seen: list[str] = []
        self._calls = 0  # in the step before
        self._schedule: torch.Tensor | None = None
        self._indices: torch.Tensor | None = None
        self._counter: int | None = None
        self._mark: tuple[Any, Any] = (None, None)  # where the scheduler stood at the latest call
        self._is_idle = False  # whether it is not the one that samples
        self._has_warned = False
        self._levels_of: torch.Tensor | None = None  # the list of timesteps that _levels was read from
        self._levels: list[Level] = []
        self._restart()
        self.state: StepState | None = None

    @property
    def pipeline(self) -> Any | None:
        """The pipeline, while there is one."""
        return self._pipeline() if self._pipeline is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> StepClock:
        """Reads the scheduler of the copied pipeline, where it is a pipeline that is copied."""
        memo[id(self)] = copied = type(self)()
        fields = {name: value for name, value in vars(self).items() if name != "_pipeline"}
        vars(copied).update(copy.deepcopy(fields, memo))
        here = self.pipeline
        there = memo.get(id(here), here)
        copied._pipeline = None if there is None else weakref.ref(there)
        return copied

    def set_step(self, step: int | None, steps: int | None = None, branch: str | None = None) -> None:
        """Says outright which step comes next, for sampling loops of one's own; ``set_step(None)`` takes it back."""
        if step is not None and step < 0:
            raise ValueError(f"a step index counts from 0; got {step}")
        self._explicit = _Context(branch, step, steps)

    def reset(self) -> None:
        """Makes the next call the first of a new generation; for loops that repeat the same schedule."""
        self._last_step = None
        self._schedule = None

    def push_context(self, name: str | None, step: int | None = None, steps: int | None = None) -> None:
        """Enters a named context of diffusers (see :meth:`pop_context`)."""
        self._contexts.append(_Context(name, step, steps))

    def pop_context(self) -> None:
        """Leaves the innermost context."""
        self._contexts.pop()

    def tick(self, expert: str, layout: TokenLayout, arguments: Mapping[str, Any]) -> StepState:
        """Registers one call of a root model and says where in the generation it stands."""
        context = self._contexts[-1] if self._contexts else _Context()
        timestep = arguments.get("timestep")
        if self._is_new_generation(context, timestep, layout):
            self._restart()
        step, steps = self._locate(context, timestep)
        if step != self._last_step:
            self._calls, self._seen = len(self._seen), []
        branch = self._explicit.name or context.name or f"call{len(self._seen)}"
        self.state = StepState(self._generation, step, steps, branch, expert, self._ordinal, layout, timestep)
        self._last_step, self._last_timestep, self._last_grid = step, timestep, layout.grid
        self._seen.append(branch)
        self._ordinal += 1
        return self.state

    def is_guided(self) -> bool | None:
        """Whether the pipeline says that it runs with classifier-free guidance; None if it says nothing."""
        said = getattr(self.pipeline, "do_classifier_free_guidance", None)
        return said if isinstance(said, bool) else None

    def level(self, step: int) -> Level:
        """Timestep and noise level of a step as the scheduler has them, None for what it does not say.

        Reads the scheduler's lists once per generation; tensors on a device are waited for then.
        """
        if self._is_idle:
            return Level(None, None)  # what it lists is of another run
        scheduler = self._scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not self._levels_of:
            self._levels_of = timesteps
            self._levels = read_levels(scheduler)
        return self._levels[step] if step < len(self._levels) else Level(None, None)

    def _restart(self) -> None:
        self._generation += 1
        self._last_step = self._last_timestep = self._last_grid = None
        self._ordinal = self._calls = 0
        self._seen = []

    def _scheduler(self) -> Any | None:
        return getattr(self.pipeline, "scheduler", None)

    def _is_new_generation(self, context: _Context, timestep: torch.Tensor | None, layout: TokenLayout) -> bool:
        has_new_schedule = self._note_schedule()
        said = self._explicit.step if self._explicit.step is not None else context.step
        was_idle, self._is_idle = self._is_idle, self._other_samples(has_new_schedule, timestep, said)
        if self._last_step is None:
            return self._ordinal > 0
        # The grid alone: branches that nobody names may have texts of different lengths.
        if has_new_schedule or self._is_idle > was_idle or (layout.grid != self._last_grid and not self._contexts):
            return True
        if said is not None:
            return said < self._last_step or (said == self._last_step and context.name in self._seen)
        if self._schedule is not None and not self._is_idle:
            return False
        return _value(timestep) > _value(self._last_timestep)

    def _note_schedule(self) -> bool:
        """Whether the scheduler was given a new list of timesteps: ``set_timesteps`` always makes a new tensor."""
        timesteps = getattr(self._scheduler(), "timesteps", None)
        if timesteps is self._schedule:
            return False
        self._schedule = timesteps
        self._indices = None
        return timesteps is not None

    def _other_samples(self, has_new_schedule: bool, timestep: torch.Tensor | None, said: int | None) -> bool:
        """Whether another scheduler samples, so that the pipeline's own says nothing about this call; warns once.

        Its own has run to its end, or stands still while timesteps pass. Timesteps, which the device is waited for,
        are compared only where the step would have more calls than the one before.
        """
        scheduler: Any = self._scheduler()
        before, found = self._mark, self._is_idle
        if self._schedule is None or timestep is None or said is not None or not hasattr(scheduler, "step_index"):
            return False
        self._mark = (scheduler.step_index, getattr(scheduler, "begin_index", None))
        if has_new_schedule or self._mark != before:
            found = self._mark[0] is not None and int(self._mark[0]) >= len(self._schedule)
        elif not found and self._last_timestep is not None and len(self._seen) >= self._calls:
            found = _value(timestep) != _value(self._last_timestep) and not self._is_listed(timestep)
        if found and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "dit_accel: the model is sampled, but not by the scheduler of the pipeline that is accelerated, so "
                "steps are told from timesteps alone and nobody knows how many there are; accelerate the pipeline "
                "that runs, or call clock.set_step(step, steps) before each call of the model",
                stacklevel=2,
            )
        return found

    def _locate(self, context: _Context, timestep: torch.Tensor | None) -> tuple[int, int | None]:
        count = len(self._schedule) if self._schedule is not None else None
        for source in (self._explicit, context):
            if source.step is not None:
                return source.step, source.steps or count
        if self._schedule is not None and not self._is_idle:
            return self._index_in_schedule(self._schedule, timestep), count
        if self._last_step is None:
            return 0, None
        return self._last_step + (_value(timestep) != _value(self._last_timestep)), None

    def _index_in_schedule(self, schedule: torch.Tensor, timestep: torch.Tensor | None) -> int:
        """The scheduler's own counter where it keeps one, else the place of the timestep in its list."""
        scheduler: Any = self._scheduler()
        if hasattr(scheduler, "step_index"):
            told = (scheduler.step_index, getattr(scheduler, "begin_index", None))
            index = next((each for each in told if each is not None), None)
            return int(index) if index is not None else self._first_index(schedule, timestep)
        listed = self._listed(schedule)
        first = int((listed - _value(timestep)).abs().argmin())
        counter, before = getattr(scheduler, "counter", None), self._counter
        self._counter = counter
        if counter is None or self._last_step is None or listed[self._last_step] != listed[first]:
            return first
        # PNDM lists some timesteps twice in a row, and counts its steps.
        return min(self._last_step + (counter != before), len(schedule) - 1)

    def _is_listed(self, timestep: torch.Tensor) -> bool:
        """Whether a loop may go by the scheduler's own list without ever stepping it."""
        scheduler: Any = self._scheduler()
        if self._mark != (None, None) or getattr(scheduler, "num_inference_steps", None) is None:
            return False
        assert self._schedule is not None
        listed = self._listed(self._schedule)
        return float((listed - _value(timestep)).abs().min()) <= _CLOSE * float(listed.abs().max())

    def _first_index(self, schedule: torch.Tensor, timestep: torch.Tensor | None) -> int:
        """Where sampling begins if the scheduler was not told: loops over a part of its list begin further on.

        0 for a timestep that is not in the list: some models are given another number, such as a thousandth.
        """
        if timestep is None:
            return 0
        listed, value = self._listed(schedule), _value(timestep)
        largest = float(listed.abs().max())
        first = int((listed - value).abs().argmin())
        if abs(float(listed[first]) - value) > _CLOSE * largest or value <= 1 < largest:
            return 0
        # Of two equal ones schedulers take the second, unless nothing was left out.
        is_twice = 0 < first < len(listed) - 1 and listed[first] == listed[first + 1]
        return first + bool(is_twice)

    def _listed(self, schedule: torch.Tensor) -> torch.Tensor:
        """The list of timesteps as numbers in main memory; waits for the device once."""
        if self._indices is None:
            self._indices = schedule.detach().float().cpu()
        return self._indices


def _value(timestep: torch.Tensor | float | None) -> float:
    """A timestep as a number; one per token (Wan 2.2 5B) counts as the largest of them."""
    if timestep is None:
        raise ValueError(
            "the model was called without a timestep, so its sampling step cannot be told; "
            "call clock.set_step(step, steps) before it"
        )
    return float(torch.as_tensor(timestep).max())
