"""What a run computes and what lies in memory between its steps, told alike for our caches and those of others."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)


class Work:
    """Watches one run of some models.

    Args:
        roots: transformers or UNets.
        looks_at: number of the call, over all roots and from 0, before which memory is looked at, as it is before the
            first call; None for never.

    Attributes:
        products: multiplications of linear and convolution layers, those of attention itself left out.
        calls: of the roots.
        grown: by how many bytes the tensors have grown from the first of these looks to the second.
        paused: seconds that looking took.
    """

    def __init__(self, roots: Sequence[nn.Module], looks_at: int | None = None) -> None:
        self._roots, self._looks_at = roots, looks_at
        self.products, self.calls = 0, 0
        self.grown: int | None = None
        self._held = 0
        self.paused = 0.0

    @contextmanager
    def watched(self) -> Iterator[Work]:
        """Counts as long as it lasts."""
        layers = [each for root in self._roots for each in root.modules() if isinstance(each, LAYERS)]
        handles = [each.register_forward_hook(self._count) for each in layers]
        handles += [root.register_forward_pre_hook(self._call) for root in self._roots]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, layer: nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        weight: Any = layer.weight
        self.products += output.numel() * weight[0].numel()

    def _call(self, *_: Any) -> None:
        if self._looks_at is not None and self.calls in (0, self._looks_at):
            started = time.perf_counter()
            held = held_bytes()
            self.grown, self._held = held - self._held if self.calls else None, held
            self.paused += time.perf_counter() - started
        self.calls += 1


_WITH_MEMORY = (torch.Tensor, torch.nn.Parameter)  # other types are the compiler's, and have none


def held_bytes() -> int:
    """Bytes of every tensor that Python can reach, on all devices; memory that several share counts once."""
    gc.collect()
    storages: dict[int, int] = {}
    for each in gc.get_objects():
        if type(each) in _WITH_MEMORY and each.layout is torch.strided and not each.is_meta:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
