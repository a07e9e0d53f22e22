"""Attention methods, one file each: ``from dit_accel.processors import RadialAttnProcessor``."""

from __future__ import annotations

from typing import Any

from .base import SparseAttnProcessor
from .radial import RadialAttnProcessor

ATTENTION: dict[str, type[SparseAttnProcessor]] = {"radial": RadialAttnProcessor}


def processor_by_name(name: str, **settings: Any) -> SparseAttnProcessor:
    """Builds a method by its short name, as ``accelerate(pipe, attention="radial")`` does.

    Raises:
        ValueError: for an unknown name or setting, or a setting out of range.
    """
    if name not in ATTENTION:
        raise ValueError(f"unknown attention method {name!r}; choose one of {', '.join(ATTENTION)}")
    try:
        return ATTENTION[name](**settings)
    except TypeError as error:
        raise ValueError(f"attention method {name!r}: {str(error).split('()', 1)[-1].strip()}") from error


__all__ = ["ATTENTION", "RadialAttnProcessor", "SparseAttnProcessor", "processor_by_name"]
