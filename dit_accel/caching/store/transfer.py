"""Moves tensors between a GPU and main memory beside its other work."""

from __future__ import annotations

import torch
from torch import Tensor


class Transfer:
    """Copies to pinned main memory and back on a stream of its own; plain copies where there is no CUDA device.

    All copies of one device run in order on that stream, so a tensor is never fetched before it has been put away.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def to_host(self, value: Tensor) -> Tensor:
        """A copy in main memory; it may not be read by the CPU before the device is done with it."""
        if not value.is_cuda:
            return value.to("cpu")
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        stream = self._stream(value.device)
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            host.copy_(value, non_blocking=True)
        value.record_stream(stream)
        return host

    def to_device(self, value: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """Starts a copy on a device; whoever reads it calls :meth:`wait` first."""
        if device.type != "cuda":
            return value.to(device), None
        stream = self._stream(device)
        with torch.cuda.stream(stream):
            copy = value.to(device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return copy, event

    def wait(self, copy: Tensor, event: torch.cuda.Event | None) -> Tensor:
        """The copy, ready for the stream of the caller; the CPU does not wait."""
        if event is not None:
            current = torch.cuda.current_stream(copy.device)
            current.wait_event(event)
            copy.record_stream(current)
        return copy

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
