"""How one kept tensor is held: as it is or as 8-bit numbers, on its device or in main memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Codec = Literal["plain", "fp8"]

#: Largest finite number of float8 e4m3.
FP8_LARGEST = 448.0
_FP8_SOURCES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ValueSpec:
    """Size of one tensor that is to be kept.

    Attributes:
        shape: of the tensor; the last axis holds the channels of a token.
        dtype: of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor) -> ValueSpec:
        """The size of a tensor that is there."""
        return cls(tuple(value.shape), value.dtype)

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()

    def nbytes(self, codec: Codec = "plain") -> int:
        """Bytes that it takes when held with a codec, exactly."""
        if codec == "plain":
            return self.count * self.dtype.itemsize
        return self.count + 4 * torch.Size(self.shape[:-1]).numel()


@dataclass(frozen=True)
class Held:
    """One tensor as it is held.

    Attributes:
        data: its numbers, in its own dtype or in float8.
        scale: float32 ``[..., 1]`` that float8 numbers are multiplied by; None for its own dtype.
        dtype: its own dtype.
        home: the device it came from, and goes back to.
    """

    data: Tensor
    scale: Tensor | None
    dtype: torch.dtype
    home: torch.device

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that take memory."""
        return (self.data,) if self.scale is None else (self.data, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes it takes, wherever it lies."""
        return sum(part.numel() * part.itemsize for part in self.parts)

    @property
    def is_away(self) -> bool:
        """Whether it was moved off its device."""
        return self.data.device != self.home

    def moved(self, parts: Sequence[Tensor]) -> Held:
        """The same with copies of its :attr:`parts` that lie elsewhere."""
        return Held(parts[0], parts[1] if len(parts) > 1 else None, self.dtype, self.home)


def encode(value: Tensor, codec: Codec) -> Held:
    """Takes a tensor in, on its own device; ``"plain"`` keeps the tensor itself.

    Float8 is e4m3 with one scale for each row of the last axis (a token), so that a token of outliers costs the others
    nothing. A number comes back with an error of at most ``max(|x| / 16, largest of its row / 448 / 1024)``, besides
    the rounding of its own dtype.
    """
    value = value.detach()
    if codec == "plain":
        return Held(value, None, value.dtype, value.device)
    wide = value.float()
    scale = (wide.abs().amax(-1, keepdim=True) / FP8_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return Held((wide / scale).to(torch.float8_e4m3fn), scale, value.dtype, value.device)


def decode(held: Held) -> Tensor:
    """The tensor in its own dtype, where it is held; the held one itself for ``"plain"``."""
    if held.scale is None:
        return held.data
    return (held.data.float() * held.scale).to(held.dtype)


def why_no_fp8(spec: ValueSpec, device: torch.device) -> str | None:
    """Why a tensor cannot be held in float8, or gains nothing by it; None if it can."""
    if spec.dtype not in _FP8_SOURCES or not spec.shape:
        return f"values are {str(spec.dtype).removeprefix('torch.')} of shape {spec.shape}"
    if spec.nbytes("fp8") >= spec.nbytes():
        return f"values have {spec.shape[-1]} channels, and one scale per token is as large as they are"
    return _why_no_conversion(str(device))


@cache
def _why_no_conversion(device: str) -> str | None:
    if not hasattr(torch, "float8_e4m3fn"):
        return f"torch {torch.__version__} has no float8_e4m3fn"
    try:
        torch.ones(1, device=device).to(torch.float8_e4m3fn).float()
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        return f"{device} does not convert to float8 ({str(error).splitlines()[0][:80]})"
    return None
