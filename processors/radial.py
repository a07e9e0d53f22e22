"""Radial Attention: the farther two frames are apart, the fewer pairs of their tokens attend to each other.

Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation", NeurIPS
2025, arXiv 2506.19852.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..plan.radial import radial_plan
from .base import StaticAttnProcessor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..families import Family
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule


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
        schedule: instead of these two; its budgets are factors on ``decay``, that is on the widths of the bands.
            Densities follow less than in proportion: all pairs of neighboring frames are kept in any case.
        backend: kernel backend.

    Raises:
        ValueError: for settings outside these, budgets of heads, or budgets under the paper's rule.
    """

    needs_frames = True
    usual_dense_layers = 1
    scales_budget = True
    scales_heads = False

    def __init__(
        self,
        *,
        rule: str = "authors",
        block: int = 128,
        decay: float = 0.2,
        sink: bool = True,
        mask: str = "block",
        dense_steps: int | float | None = None,
        dense_layers: int | Collection[int] | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dense_steps=dense_steps, dense_layers=dense_layers, schedule=schedule, backend=backend)
        self.rule, self.block, self.decay, self.sink, self.mask = rule, block, decay, sink, mask
        if block not in (64, 128):
            raise ValueError(f"radial attention works on blocks of 64 or 128 tokens; got {block}")
        radial_plan((1, 1, 1), block=block, decay=decay, rule=rule, sink=sink, mask=mask)  # raises on bad settings
        if rule == "paper":
            self.refuse_budgets("the paper's rule has no factor on its widths; use rule='authors'")
        self._scaled: dict[float, RadialAttnProcessor] = {}

    def for_step(self, site: SiteInfo, state: StepState) -> StaticAttnProcessor:
        """Itself with other widths of the bands, if the schedule has budgets."""
        factor = self.budget_factor(site, state)
        if factor == 1:
            return self
        if factor not in self._scaled:
            own = self.settings() | {"decay": self.decay * factor, "schedule": {}}
            self._scaled[factor] = RadialAttnProcessor(**own)
        return self._scaled[factor]

    def check_family(self, family: Family) -> None:
        """As :meth:`SparseAttnProcessor.check_family`; families with the text in front are refused as well."""
        super().check_family(family)
        if family.text_first:
            raise ValueError(
                f"radial attention wants the video before the text, and {family.root_class} has the text first; "
                'choose another method, such as "block_routing" or "compensated"'
            )

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
        return self.plain_settings("rule", "block", "decay", "sink", "mask", "backend")
