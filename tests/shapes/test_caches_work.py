"""What a run with a cache computes, and what lies in memory between its steps."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

from dit_accel.shapes.caches.work import Work, held_bytes


def test_work_is_counted_and_memory_is_looked_at_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Conv2d(2, 4, 3, padding=1))
    kept: list[torch.Tensor] = []

    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept.append(torch.zeros(1000))
            return self.inner[1](self.inner[0](x))

    root = Root()
    work = Work([root], looks_at=1)
    with work.watched():
        for _ in range(2):
            root(torch.zeros(1, 2, 4, 3))
    assert work.calls == 2
    assert work.products == 2 * (2 * 4 * 5 * 3 + 4 * 4 * 5 * 2 * 9)
    assert work.grown is not None
    assert 4000 <= work.grown < 5000  # what the first call kept, and nothing of the second
    assert work.paused > 0
    root(torch.zeros(1, 2, 4, 3))
    assert work.calls == 2


def test_tensors_of_a_compiler_have_no_memory() -> None:
    before = held_bytes()
    with FakeTensorMode():
        kept = [torch.zeros(10_000), torch.nn.Parameter(torch.zeros(10_000))]
    assert held_bytes() - before < 40_000 and len(kept) == 2


def test_shared_memory_counts_once() -> None:
    before = held_bytes()
    base = torch.zeros(5000)
    views = [base[:100], base.view(50, 100)]
    assert held_bytes() - before == 20000
    del base, views
    assert held_bytes() == before
