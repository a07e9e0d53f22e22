"""Linear extrapolation whose length the probe tells: DiCache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Place, Predictor
from .clip import widened
from .reuse import Reuse


@dataclass(frozen=True)
class AdaptiveLinear(Predictor):
    """Goes on along the line through the two latest values as far as the probe went along its own.

    DiCache (arXiv 2508.17356): with the probe ``p`` of the skipped step and those kept with the values,
    ``g = mean|p - p_cc| / mean|p_c - p_cc|``, bounded to ``[lowest, highest]``, and ``Y^ = Y_cc + g (Y_c - Y_cc)``.
    ``g`` stays on the device, so nothing waits for it. Where the probe has not moved between the computed steps, it
    tells nothing, and ``g`` is 1: the latest value.

    Attributes:
        lowest: of g; 1 is the latest value.
        highest: of g.

    Raises:
        ValueError: if the range is empty or below 0; at prediction, if there are no probes.
    """

    lowest: float = 1.0
    highest: float = 1.5
    depth = 2
    needs_probe = True

    def __post_init__(self) -> None:
        if not 0 <= self.lowest <= self.highest:
            raise ValueError(f"0 <= lowest <= highest is needed; got {self.lowest} and {self.highest}")

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """See :meth:`Predictor.predict`."""
        if len(kept) < 2:
            return kept[0].value
        latest, before = kept[0], kept[1]
        if probe is None or latest.probe is None or before.probe is None:
            raise ValueError("AdaptiveLinear goes by what the first blocks add; combine it with a policy that probes")
        moved = (probe.float() - before.probe.float()).abs().mean()
        known = (latest.probe.float() - before.probe.float()).abs().mean()
        gain = torch.where(known > 0, moved / known, torch.ones_like(known)).clamp(self.lowest, self.highest)
        value = widened(latest.value)
        return torch.addcmul(value, (gain - 1).to(value.dtype), value - before.value).to(latest.value.dtype)

    def lowered(self) -> Predictor:
        """The latest value; then no probes are kept, either."""
        return Reuse()
