"""Searches in full precision: what they compare differs by little, and autocast would round it to 16 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_full_precision(search: Callable[P, R]) -> Callable[P, R]:
    """Makes a function whose first argument is a tensor deaf to autocast; for what compiled code does not look into.

    Its inputs are taken as they are, so it should turn them into float32 itself.
    """

    @functools.wraps(search)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not torch.amp.is_autocast_available(first.device.type):  # such as on the meta device
            return search(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return search(*args, **kwargs)

    return run
