"""Radial Attention: the farther two frames are apart, the fewer pairs of their tokens attend to each other.

Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation", NeurIPS
2025, arXiv 2506.19852.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from ..plan.radial import radial_plan
from .base import PUBLISHED_WARM_UP, StaticAttnProcessor

if TYPE_CHECKING:
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout


class RadialAttnProcessor(StaticAttnProcessor):
    """Static sparse attention whose density decays with the distance between frames.

    By both rules all pairs within a frame are kept, so models of images are refused.

    Args:
        rule: ``"authors"``, what the authors' code runs, or ``"paper"``, the formula of the paper.
        block: tokens per block of queries and of keys, 64 or 128.
        decay: width factor of the authors' rule; larger keeps more. They use 0.2 for Wan 2.1, 0.95 for HunyuanVideo.
        sink: whether every query sees the whole first frame.
        mask: ``"block"`` keeps or drops whole blocks, ``"element"`` follows the rule exactly inside them.
        dense_steps: sampling steps that stay dense; 12 of 50 in the paper, hence the fraction 0.24.
        dense_layers: layers that stay dense; the authors keep the first.
        backend: kernel backend.

    Raises:
        ValueError: for settings outside these.
    """

    needs_frames = True

    def __init__(
        self,
        *,
        rule: str = "authors",
        block: int = 128,
        decay: float = 0.2,
        sink: bool = True,
        mask: str = "block",
        dense_steps: int | float = PUBLISHED_WARM_UP,
        dense_layers: int | Collection[int] = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__(dense_steps=dense_steps, dense_layers=dense_layers, backend=backend)
        self.rule, self.block, self.decay, self.sink, self.mask = rule, block, decay, sink, mask
        if block not in (64, 128):
            raise ValueError(f"radial attention works on blocks of 64 or 128 tokens; got {block}")
        radial_plan((1, 1, 1), block=block, decay=decay, rule=rule, sink=sink, mask=mask)  # raises on bad settings

    def build_plan(self, layout: TokenLayout, device: torch.device) -> SparsePlan:
        """The radial plan of a token grid; text rows and columns are always kept.

        Raises:
            ValueError: if text does not directly follow the video in the token order, or there are other tokens.
        """
        if layout.visual[0] != 0 or layout.references or layout.padding:
            raise ValueError(f"radial attention expects [video, text] tokens without padding; got {layout}")
        return radial_plan(
            layout.grid,
            block=self.block,
            decay=self.decay,
            rule=self.rule,
            sink=self.sink,
            text_tokens=layout.text_tokens,
            mask=self.mask,
            device=device,
        )

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        names = ("rule", "block", "decay", "sink", "mask", "backend")
        return {name: getattr(self, name) for name in names} | self.policy.settings()
