"""Wall time of each call of the model, split into attention, work of the cache, and all other.

A :class:`Timer` only sets marks while the model runs. On CUDA a mark is an event, recorded in the stream without
waiting; the times between them are read when the report is made. Attention within compiled code cannot be told apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

if TYPE_CHECKING:
    from .clock import StepState

Part = Literal["attention", "cache"]


class Event(Protocol):
    """What is used of ``torch.cuda.Event``."""

    def record(self) -> None:
        """Marks this point of the current stream."""

    def synchronize(self) -> None:
        """Waits until the device has come to the mark."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this mark to another."""


class Marks(Protocol):
    """Points in time on one kind of device."""

    def mark(self) -> Any:
        """Now, as the device sees it; does not wait."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks; may wait for the device."""

    def free(self, marks: Sequence[Any]) -> None:
        """Marks that nobody will read any more."""


class HostMarks:
    """Marks on a CPU, where each operation is done when its call returns."""

    def mark(self) -> float:
        """See :meth:`Marks.mark`."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """See :meth:`Marks.seconds`."""
        return end - start

    def free(self, marks: Sequence[float]) -> None:
        """See :meth:`Marks.free`."""


class EventMarks:
    """Marks in a stream of a device; events are used again once their times were dropped.

    Args:
        make: makes an event that can tell times.
    """

    def __init__(self, make: Callable[[], Event]) -> None:
        self._make = make
        self._spare: list[Event] = []

    def mark(self) -> Event:
        """See :meth:`Marks.mark`."""
        event = self._spare.pop() if self._spare else self._make()
        event.record()
        return event

    def seconds(self, start: Event, end: Event) -> float:
        """See :meth:`Marks.seconds`."""
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def free(self, marks: Sequence[Event]) -> None:
        """See :meth:`Marks.free`."""
        self._spare.extend(marks)


def marks_for(device: torch.device) -> Marks:
    """How time is taken on a device.

    Raises:
        ValueError: for one where we cannot.
    """
    if device.type == "cpu":
        return HostMarks()
    if device.type == "cuda":
        return EventMarks(lambda: torch.cuda.Event(enable_timing=True))
    raise ValueError(f"timed=True works on cpu and cuda; the model runs on {device.type}, so leave it out")


@dataclass(frozen=True)
class CallTime:
    """One call of a root model, in seconds.

    Attributes:
        generation: as the clock counts them.
        step: index of the sampling step.
        branch: branch of guidance.
        expert: attribute name of the root in its pipeline.
        total: the whole call.
        attention: the attention of all its sites; 0 if there was none.
        cache: deciding, predicting, keeping.
    """

    generation: int
    step: int
    branch: str
    expert: str
    total: float
    attention: float
    cache: float

    @property
    def other(self) -> float:
        """What is left."""
        return self.total - self.attention - self.cache


@dataclass
class TimeReport:
    """Where the time of the latest generation went, in seconds.

    Attributes:
        calls: of the model, in order.
        attention_seen: whether attention could be told apart; not so in compiled code.
    """

    calls: list[CallTime] = field(default_factory=list)
    attention_seen: bool = False

    @property
    def total(self) -> float:
        """All calls of the model; what the pipeline does besides is not in it."""
        return sum(call.total for call in self.calls)

    @property
    def attention(self) -> float | None:
        """Time in attention; None if it could not be told apart."""
        return sum(call.attention for call in self.calls) if self.attention_seen else None

    @property
    def cache(self) -> float:
        """Time that the cache itself took."""
        return sum(call.cache for call in self.calls)

    @property
    def other(self) -> float:
        """All that is neither; with attention if that could not be told apart."""
        return sum(call.other for call in self.calls)

    def split(self) -> dict[str, float | None]:
        """The four numbers together."""
        return {"total": self.total, "attention": self.attention, "cache": self.cache, "other": self.other}

    def by_step(self) -> dict[int, dict[str, float | None]]:
        """The same for every step, over its branches."""
        steps = sorted({call.step for call in self.calls})
        return {
            step: TimeReport([call for call in self.calls if call.step == step], self.attention_seen).split()
            for step in steps
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        steps = [{"step": step, **split} for step, split in self.by_step().items()]
        return {"split": self.split(), "steps": steps, "calls": [asdict(call) for call in self.calls]}

    def summary(self) -> str:
        """One line for people."""
        if not self.calls:
            return "time of the model: nothing timed yet"
        shares = {name: value for name, value in self.split().items() if name != "total" and value is not None}
        words = ", ".join(f"{name} {value / self.total:.1%}" for name, value in shares.items() if self.total > 0)
        untold = "" if self.attention_seen else "; attention is part of other, as compiled code does not tell it apart"
        return f"time of the model: {self.total:.2f} s in {len(self.calls)} calls, of it {words}{untold}"


@dataclass
class _Call:
    state: StepState
    marks: Marks
    start: Any
    end: Any = None
    spans: list[tuple[Part, Any, Any]] = field(default_factory=list)
    within: list[Part] = field(default_factory=list)  # parts that are open, outermost first
    since: Any = None  # the innermost has run without another in it

    def free(self) -> None:
        inner = [mark for _, start, end in self.spans for mark in (start, end)]
        marks = {id(mark): mark for mark in (self.start, self.end, *inner)}  # two spans may share one
        self.marks.free([mark for mark in marks.values() if mark is not None])

    def enter(self, part: Part) -> None:
        now = self.marks.mark()
        if self.within:
            self.spans.append((self.within[-1], self.since, now))
        self.within.append(part)
        self.since = now

    def leave(self) -> None:
        now = self.marks.mark()
        self.spans.append((self.within.pop(), self.since, now))
        self.since = now

    def read(self) -> CallTime:
        sums: dict[Part, float] = {"attention": 0.0, "cache": 0.0}
        for part, start, end in self.spans:
            sums[part] += self.marks.seconds(start, end)
        total, state = self.marks.seconds(self.start, self.end), self.state
        return CallTime(state.generation, state.step, state.branch, state.expert, total, **sums)


class Timer:
    """Takes the time of every call of the model; keeps those of the latest generation.

    Args:
        marks: how time is taken on a device.
    """

    def __init__(self, marks: Callable[[torch.device], Marks] = marks_for) -> None:
        self._marks_for = marks
        self._marks: dict[torch.device, Marks] = {}
        self._open: _Call | None = None
        self._calls: list[_Call] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Timer:
        """A new one: the times of a model are not those of its copy, and events cannot be copied."""
        return Timer(self._marks_for)

    def begin(self, state: StepState, device: torch.device) -> None:
        """A call of the root begins.

        Args:
            state: where in the generation it stands.
            device: where it runs; that of its inputs, since weights may be elsewhere until they are needed.

        Raises:
            ValueError: for a device on which time cannot be taken.
        """
        if self._calls and self._calls[0].state.generation != state.generation:
            self.reset()
        if device not in self._marks:
            self._marks[device] = self._marks_for(device)
        marks = self._marks[device]
        self._open = _Call(state, marks, marks.mark())

    def end(self) -> None:
        """The call ends, also if it failed. Does nothing if none has begun."""
        if self._open is None:
            return
        self._open.end = self._open.marks.mark()
        self._calls.append(self._open)
        self._open = None

    @contextmanager
    def span(self, part: Part) -> Iterator[None]:
        """Around one part of the work of a call; a part within another counts for itself alone. Not timed outside."""
        call = self._open
        if call is None or call.within[-1:] == [part] or torch.compiler.is_compiling():
            yield
            return
        call.enter(part)
        try:
            yield
        finally:
            call.leave()

    def read(self) -> TimeReport:
        """The times of the latest generation; waits for the device."""
        seen = any(part == "attention" for call in self._calls for part, _, _ in call.spans)
        return TimeReport([call.read() for call in self._calls], seen)

    def reset(self) -> None:
        """Forgets all calls that have ended."""
        for call in self._calls:
            call.free()
        self._calls.clear()


@contextmanager
def spent(timer: Timer | None, part: Part) -> Iterator[None]:
    """:meth:`Timer.span` of a timer that may not be there."""
    if timer is None:
        yield
        return
    with timer.span(part):
        yield
