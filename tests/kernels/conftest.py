"""Fixtures of the kernel tests: poisoned memory and another default dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import pytest
import torch
from torch import Tensor

T = TypeVar("T")


class UnderDefault(Protocol):
    """What the fixture `under_default` gives."""

    def __call__(self, dtype: torch.dtype, call: Callable[[], T]) -> T:
        """Runs `call` while torch's default dtype is `dtype`."""


@pytest.fixture
def under_default() -> UnderDefault:
    """Runs a call while torch's default dtype is another one."""
    before = torch.get_default_dtype()

    def run(dtype: torch.dtype, call: Callable[[], T]) -> T:
        torch.set_default_dtype(dtype)
        try:
            return call()
        finally:
            torch.set_default_dtype(before)

    return run


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills uninitialised float memory with NaN, so that an element nobody wrote shows up in the result."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    assert torch.empty(1).isnan().all()
    yield
