"""T-GATE's cross-attention: the mean of both branches of guidance stands in for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Place, Predictor


@dataclass(frozen=True)
class BranchMean(Predictor):
    """The latest value; where a batch holds both branches of guidance, their mean for both (arXiv 2404.02747)."""

    needs_pairs = True

    def predict(self, kept: Sequence[Kept], place: Place, probe: Tensor | None = None) -> Tensor:
        """See :meth:`Predictor.predict`."""
        value = kept[0].value
        if not place.paired or len(value) % 2:
            return value
        unconditional, conditional = value.chunk(2)
        return torch.cat([(unconditional + conditional) / 2] * 2)
