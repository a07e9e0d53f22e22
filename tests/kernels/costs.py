"""What a call costs beside time: memory, and numbers that it reads from the device one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator held at a time during `call`, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    assert result is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class _Reads(TorchDispatchMode):
    """Counts numbers that are read one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def single_reads(call: Callable[[], Any]) -> int:
    """How many numbers `call` reads one by one, each of which a GPU would be waited for; operators hide theirs."""
    with _Reads() as reads:
        call()
    return reads.count
