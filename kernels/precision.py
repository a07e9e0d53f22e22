"""Full precision where autocast would round to 16 bits: in searches, whose scores differ little, and in operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function whose first argument is a tensor deaf to autocast; for what compiled code does not look into.

    Its inputs are taken as they are, so it should turn into float32 itself what needs it.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        kind = first.device.type
        # Devices such as meta have none, and may not be asked whether it is on.
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run
