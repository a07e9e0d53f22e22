"""Reads numbers off tensors that callers pass again and again; once each, since that waits for the device."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class ReadOnce(Generic[T]):
    """Remembers what a function read off each tensor, for as long as the tensor lives and nobody writes into it.

    Args:
        read: what to read.
    """

    def __init__(self, read: Callable[[Tensor], T]) -> None:
        self._read = read
        self._known: MutableMapping[Tensor, tuple[int, T]] = WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor) -> T:
        """What the function says about the tensor. Writing in inference mode leaves no trace, and is not noticed."""
        version = 0 if tensor.is_inference() else tensor._version
        known = self._known.get(tensor)
        if known is None or known[0] != version:
            known = (version, self._read(tensor))
            self._known[tensor] = known
        return known[1]
