"""Neighborhood attention: every token sees a window around it on the grid of frames, rows and columns.

Source: Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
arXiv 2504.16922, and the papers before it: neighborhood attention (CVPR 2023, arXiv 2204.07143), dilated neighborhood
attention (arXiv 2209.15001).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..plan.neighborhood import USUAL_WINDOW, check_settings, neighborhood_plan
from .base import StaticAttnProcessor

if TYPE_CHECKING:
    from ..controls import SiteInfo
    from ..families import Family
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule

PUBLISHED_DENSE_STEPS = 0.3  # 15 of 50 steps for HunyuanVideo; all layers are sparse
PER_AXIS = ("window", "stride", "dilation", "causal", "tile")


class NeighborhoodAttnProcessor(StaticAttnProcessor):
    """Static sparse attention to a window around each query, for videos and for images.

    A setting of the window is one number for every dimension, or one number each for (frames, rows, columns), or for
    (rows, columns) in models of images. At borders the window moves inward, so every query has as many keys. Text
    and reference tokens see everything and are seen by all.

    Sliding attention is stride 1; blocks that do not overlap are a stride as large as the window; Sliding Tile
    Attention is a stride equal to the tile, and a window of an odd number of tiles.

    Args:
        window: keys of a query: an int counts tokens, a float is the part of each dimension, in (0, 1], rounded up.
            The default, 0.6, fits any grid and keeps about 22 % of the pairs of a video, 36 % of those of an image.
        stride: queries that share a window, 1 to the window; ``"tile"`` takes the tile, which cuts the fewest blocks.
        dilation: distance between keys; window times dilation is at most the side. ``"widest"`` is the greatest
            that fits; ``"alternate"`` is 1 in even layers and the widest in odd ones, as dilated neighborhood
            attention has it, and wants windows of at most half a side.
        causal: whether queries see no later tokens along a dimension.
        tile: tokens of a tile of the token order; by default as many as a block has, shaped so that the fewest blocks
            are computed.
        snap: compute every block that holds a kept pair whole: as much work, no test inside blocks, more pairs kept.
        block: tokens per block of queries and of keys, 64 or 128.
        dense_steps: sampling steps that stay dense; 15 of 50 in the paper, hence the fraction 0.3.
        dense_layers: layers that stay dense; none by default.
        schedule: instead of these two; it must have no budgets, since a window is not scaled.
        backend: kernel backend.

    Raises:
        ValueError: for settings that fit no grid. Those that do not fit the grid of a model are refused by its first
            call, with the range that fits.
    """

    usual_dense_steps = PUBLISHED_DENSE_STEPS

    def __init__(
        self,
        *,
        window: int | float | Sequence[int | float] = USUAL_WINDOW,
        stride: int | Sequence[int] | Literal["tile"] = 1,
        dilation: int | Sequence[int] | Literal["widest", "alternate"] = 1,
        causal: bool | Sequence[bool] = False,
        tile: int | Sequence[int] | None = None,
        snap: bool = False,
        block: int = 128,
        dense_steps: int | float | None = None,
        dense_layers: int | Collection[int] | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dense_steps=dense_steps, dense_layers=dense_layers, schedule=schedule, backend=backend)
        if block not in (64, 128):
            raise ValueError(f"neighborhood attention works on blocks of 64 or 128 tokens; got {block}")
        if not isinstance(snap, bool):
            raise ValueError(f"snap is True or False; got {snap!r}")
        self.window, self.stride, self.dilation, self.causal = window, stride, dilation, causal
        self.tile, self.snap, self.block = tile, snap, block
        self._by_parity: tuple[NeighborhoodAttnProcessor, NeighborhoodAttnProcessor] | None = None
        if dilation == "alternate":
            _check_alternation(window)
            own = self.settings()
            plain, wide = (NeighborhoodAttnProcessor(**own | {"dilation": d}) for d in (1, "widest"))
            self._by_parity = (plain, wide)
        else:
            check_settings(window=window, stride=stride, dilation=dilation, causal=causal, tile=tile, block=block)

    def check_family(self, family: Family) -> None:
        """Refuses settings for two dimensions in models of videos."""
        super().check_family(family)
        for name in PER_AXIS:
            value = getattr(self, name)
            if family.makes_video and isinstance(value, (list, tuple)) and len(value) == 2:
                raise ValueError(
                    f"{name} has 2 entries, but {family.root_class} makes videos; give one number, or three: frames, "
                    "rows, columns"
                )

    def for_site(self, site: SiteInfo) -> StaticAttnProcessor:
        """Layers in turn where dilation alternates, else itself."""
        return self if self._by_parity is None else self._by_parity[site.layer % 2]

    def build_plan(self, layout: TokenLayout, device: torch.device) -> SparsePlan:
        """The plan of a token grid; rows and columns of other tokens are always kept.

        Raises:
            ValueError: if a setting does not fit the grid, or there are padding tokens.
        """
        if layout.padding:
            raise ValueError(
                f"neighborhood attention cannot tell {layout.padding} padding tokens from text; leave them out"
            )
        if self.dilation == "alternate":
            raise ValueError('dilation="alternate" has two plans; ask for_site() for the recipe of a layer')
        before, stop = layout.visual
        return neighborhood_plan(
            layout.grid,
            window=self.window,
            stride=self.stride,
            dilation=self.dilation,
            causal=self.causal,
            tile=self.tile,
            snap=self.snap,
            block=self.block,
            before=before,
            after=layout.length - stop,
            device=device,
        )

    def token_order(self, layout: TokenLayout) -> torch.Tensor | None:
        """The token order of the plan, for ``TokenPermutation(recipe.token_order)``: permuted once per model call.

        Returns:
            int64 ``[layout.length]``, or None if tokens stay where they are.
        """
        return self.build_plan(layout, torch.device("cpu")).order

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        return self.plain_settings(*PER_AXIS, "snap", "block", "backend")


def _check_alternation(window: int | float | Sequence[int | float]) -> None:
    """Refuses windows that leave no room for dilation on any grid."""
    parts = window if isinstance(window, Sequence) else (window,)
    if not any(isinstance(part, int) or part <= 0.5 for part in parts):
        raise ValueError(
            f'dilation="alternate" needs a window of at most half a side, such as 0.3; a window of {window!r} '
            "leaves no room between its keys"
        )
