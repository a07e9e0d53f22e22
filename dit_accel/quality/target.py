"""What the user asks for: a quality against dense, or a time; exactly one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MOST = 120.0  # decibels; what equal pictures count as, so that means and spreads stay finite

_ACCEPTED = {
    "psnr": "a number of decibels above 0, such as 28",
    "ssim": "a number in (0, 1), such as 0.9",
    "rel_error": "a relative error in (0, 1), such as 0.1",
    "time": "a number of seconds above 0",
}
KEYWORDS = {"psnr": "target_psnr", "ssim": "target_ssim", "rel_error": "max_rel_error", "time": "max_time"}


@dataclass(frozen=True)
class Target:
    """A bound that every prompt is to keep.

    Attributes:
        kind: ``"psnr"`` (dB, at least), ``"ssim"`` (at least), ``"rel_error"`` (relative L2 error of the final
            latents, at most) or ``"time"`` (seconds of a whole call of the pipeline, median over prompts, at most).
        value: the bound.

    Raises:
        ValueError: if there is no such kind, or the value is out of its range.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in _ACCEPTED:
            raise ValueError(f"a target is one of {', '.join(_ACCEPTED)}; got {self.kind!r}")
        value = self.value
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and value > 0 and (value < 1 or self.kind in ("psnr", "time"))):
            raise ValueError(f"{self.keyword} is {_ACCEPTED[self.kind]}; got {value!r}")

    @property
    def keyword(self) -> str:
        """The keyword that asks for it."""
        return KEYWORDS[self.kind]

    @property
    def is_time(self) -> bool:
        """Whether a time is asked for, not a quality."""
        return self.kind == "time"

    @property
    def wanted(self) -> float:
        """The :meth:`score` that is asked for; for a time, 0."""
        return 0.0 if self.is_time else self.score(self.value)

    def score(self, value: float) -> float:
        """A measured value in decibels, more is better: scales on which prompts spread alike at every level.

        PSNR is such a scale; SSIM counts as ``-10 log10(1 - ssim)`` and a relative error as ``-20 log10(error)``.

        Args:
            value: PSNR, SSIM or relative error, as the kind says; PSNR for a time.
        """
        if math.isnan(value):
            return -math.inf
        if self.kind in ("psnr", "time"):
            return min(value, MOST)
        loss, factor = (1 - value, 10) if self.kind == "ssim" else (value, 20)
        return MOST if loss <= 0 else min(-factor * math.log10(loss), MOST)

    def said(self, score: float) -> str:
        """A :meth:`score` as what was measured, with its unit."""
        if self.kind in ("psnr", "time"):
            return f"{score:.2f} dB"
        loss = 10 ** (-score / (10 if self.kind == "ssim" else 20))
        return f"an SSIM of {1 - loss:.4f}" if self.kind == "ssim" else f"a relative error of {loss:.3g}"

    def describe(self) -> str:
        """In words, such as ``"PSNR of at least 28 dB"``."""
        words = {
            "psnr": "PSNR of at least {} dB",
            "ssim": "SSIM of at least {}",
            "rel_error": "relative error of the latents of at most {}",
            "time": "a median of at most {} s for a call",
        }
        return words[self.kind].format(f"{self.value:g}")


def target_from(
    target_psnr: float | None = None,
    target_ssim: float | None = None,
    max_rel_error: float | None = None,
    max_time: float | None = None,
) -> Target:
    """The one target that is given.

    Raises:
        ValueError: if none or several are, or the value is out of range.

    Args:
        target_psnr: dB, at least.
        target_ssim: at least; in (0, 1).
        max_rel_error: of the final latents, at most; in (0, 1).
        max_time: seconds of a call, at most.
    """
    values: dict[str, Any] = {
        "psnr": target_psnr,
        "ssim": target_ssim,
        "rel_error": max_rel_error,
        "time": max_time,
    }
    given = [kind for kind, value in values.items() if value is not None]
    if len(given) != 1:
        names = ", ".join(KEYWORDS[kind] for kind in given) or "none"
        raise ValueError(
            f"give exactly one target: target_psnr=28, target_ssim=0.9, max_rel_error=0.1 or max_time=60; got {names}"
        )
    return Target(given[0], values[given[0]])
