"""Runs partitions of a program in turns, in orders drawn from a seed.

Orders that sleeping threads would find by luck are met every time: for each program the partitions and the loads draw
weights that differ by orders of magnitude, so in some programs loads arrive at the last moment, in some at once, and
in some one partition lags far behind the others.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

_here = threading.local()
_seeds = random.Random(0)


class _Stopped(Exception):
    """Another partition failed, so this one ends too."""


class _Partition:
    """A thread that runs when it is its turn and what it waits for is true."""

    def __init__(self, program: _Program, function: Callable[..., None], arguments: Sequence[Any]) -> None:
        self.program, self.weight = program, program.draw_weight()
        self.may_go: Callable[[], bool] | None = lambda: True
        self.turn = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(function, arguments))

    def _run(self, function: Callable[..., None], arguments: Sequence[Any]) -> None:
        _here.partition = self
        self.turn.acquire()
        try:
            function(*arguments)
        except _Stopped:
            pass
        except Exception as failure:
            self.program.stop(failure)
        self.may_go = None
        following = self.program.choose()
        if following is not None:
            following.turn.release()


class _Program:
    """The partitions of one program and its loads under way."""

    def __init__(self) -> None:
        self.random = random.Random(_seeds.random())
        self.load_weight = self.draw_weight()
        self.loads: list[Callable[[], None]] = []
        self.partitions: list[_Partition] = []
        self.failure: Exception | None = None

    def draw_weight(self) -> float:
        """How often a partition gets its turn, relative to the others."""
        return self.random.choice((1e-3, 1.0, 1e3))

    def stop(self, failure: Exception) -> None:
        """Keeps the first failure; all partitions end at their next turn."""
        self.failure = self.failure or failure
        for partition in self.partitions:
            if partition.may_go is not None:
                partition.may_go = lambda: True

    def choose(self) -> _Partition | None:
        """Who goes on; lets loads arrive on the way; None when all have ended."""
        while any(partition.may_go is not None for partition in self.partitions):
            ready = [partition for partition in self.partitions if partition.may_go is not None and partition.may_go()]
            chances: list[tuple[_Partition | Callable[[], None], float]] = [(x, x.weight) for x in ready]
            chances += [(load, self.load_weight) for load in self.loads]
            if not chances:
                self.stop(TimeoutError("deadlock: a barrier is never completed"))
                continue
            (chosen,) = self.random.choices([x for x, _ in chances], [weight for _, weight in chances])
            if isinstance(chosen, _Partition):
                return chosen
            self.loads.remove(chosen)
            try:
                chosen()
            except Exception as failure:
                self.stop(failure)
        return None


def give_turn(may_go: Callable[[], bool] = lambda: True) -> None:
    """Lets others run; comes back when `may_go` is true and the turn has come round."""
    me: _Partition = _here.partition
    me.may_go = may_go
    following = me.program.choose()
    if following is not me:
        assert following is not None, "this partition has not ended"
        following.turn.release()
        me.turn.acquire()
    if me.program.failure is not None:
        raise _Stopped


def start_load(arrive: Callable[[], None]) -> None:
    """Adds a load; it arrives in the turn of its choosing."""
    _here.partition.program.loads.append(arrive)


def run(partitions: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> int:
    """Runs the partitions to their end and gives the number of loads still under way.

    Raises:
        Exception: What a partition raised; TimeoutError when all wait for ever.
    """
    program = _Program()
    program.partitions = [_Partition(program, *partition) for partition in partitions]
    for partition in program.partitions:
        partition.thread.start()
    first = program.choose()
    assert first is not None, "a program has partitions"
    first.turn.release()
    for partition in program.partitions:
        partition.thread.join()
    if program.failure is not None:
        raise program.failure
    return len(program.loads)
