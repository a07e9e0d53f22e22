"""Every head takes the mask that suits it: within frames or along time, or lines at equal distances.

Sparse VideoGen (Xi et al., ICML 2025, arXiv 2502.01776) sees two kinds of heads in video models, and tells which is
which by a few sampled queries. MMInference (Li et al., ICML 2025, arXiv 2504.16083) sees lines of keys at equal
distances, and finds their distance and phase. In a suitable token order each of these masks is a band of blocks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..kernels.grid.lines import Lines, best_line
from ..kernels.grid.masks import Masks, chosen_plan
from ..kernels.grid.probe import Probe, mask_errors, probe_of
from ..plan.grid import in_sequence, line_strides, spatial_temporal_masks, stride_masks
from .base import DynamicAttnProcessor, check_search_every
from .budget import count_tensor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..families import Family
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule
    from .base import Memory

PATTERNS = ("spatial_temporal", "stride")
MULTIPLES = (1, 2)


class Setup(NamedTuple):
    """What heads choose among, and what they are asked.

    Attributes:
        densities: that heads may be asked for, ascending; one without budgets.
        level: int64 ``[heads or 1]``, which of them each head is asked for.
        masks: for each density one for each choice.
        probe: queries to compare masks by; for ``"spatial_temporal"``.
        lines: queries to find lines by; for ``"stride"``.
    """

    densities: tuple[float, ...]
    level: torch.Tensor
    masks: Masks
    probe: Probe | None
    lines: Lines | None


class GridAttnProcessor(DynamicAttnProcessor):
    """Sparse attention by a few fixed masks, of which every head of every call takes the one that suits it.

    ``"spatial_temporal"`` (Sparse VideoGen): a band of blocks in the order of the frames, or the same kind of band
    where all frames of a pixel stand together. Some queries are attended for in full and under both; the head takes
    the mask with the smaller mean squared error.

    ``"stride"`` (the grid pattern of MMInference): tokens are put line after line, where a line holds every n-th
    token of the video. The last queries say which stride n and which line of it they look at most; that line sees
    everything and is seen by all, and the others see a band around themselves.

    Tokens that are no video (text) see everything and are seen by all. Blocks that hold both count as text.

    Args:
        pattern: ``"spatial_temporal"`` or ``"stride"``.
        density: kept pairs over all pairs of the sequence, in (0, 1]: bands are as wide as to come as near to it as
            whole blocks allow, text, first frame and lines included. They may hold more all by themselves.
        block: tokens per block, 64 or 128.
        probe_rows: queries that are asked, 1 or more.
        seed: from which queries are drawn for ``"spatial_temporal"``, for each attention module by its name and
            once for all steps; None spreads them evenly instead. For ``"stride"`` they are the last of the video.
        first_frame: whether heads with the spatial mask see the whole first frame. By default if there is no text in
            the sequence, which plays that part elsewhere. For ``"spatial_temporal"``.
        multiples: what the lengths of a row and of a frame are multiplied with, to give the strides that are tried;
            1 and 2 by default. For ``"stride"``.
        search_every: sampling steps from one choice to the next, counted from the first sparse step.
        compensate: whether blocks that are left out still count by their means; the choice does not know of it.
        dense_steps: sampling steps that stay dense; the first fifth by default, as published for Wan.
        dense_layers: layers that stay dense; the first by default.
        schedule: instead of these two; budgets are factors on the density.
        backend: kernel backend.

    Raises:
        ValueError: for settings outside these, or settings of the other pattern.
    """

    usual_dense_steps = 0.2
    usual_dense_layers = 1
    scales_budget = True

    def __init__(
        self,
        *,
        pattern: Literal["spatial_temporal", "stride"] = "spatial_temporal",
        density: float = 0.25,
        block: int = 128,
        probe_rows: int = 64,
        seed: int | None = 0,
        first_frame: bool | None = None,
        multiples: Sequence[int] | None = None,
        search_every: int = 1,
        compensate: bool = False,
        dense_steps: int | float | None = None,
        dense_layers: int | Collection[int] | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            compensate=compensate,
            dense_steps=dense_steps,
            dense_layers=dense_layers,
            schedule=schedule,
            backend=backend,
        )
        _check_pattern(pattern, first_frame, multiples)
        _check_numbers(density, block, probe_rows, seed)
        check_search_every(search_every)
        self.pattern, self.density, self.block = pattern, float(density), block
        self.probe_rows, self.seed, self.first_frame = probe_rows, seed, first_frame
        self.multiples = _checked_multiples(MULTIPLES if multiples is None else multiples) if self._by_lines else None
        self.search_every = search_every

    @property
    def _by_lines(self) -> bool:
        return self.pattern == "stride"

    def check_family(self, family: Family) -> None:
        """Refuses to look along time in models that make single images."""
        super().check_family(family)
        if not self._by_lines and not family.makes_video:
            raise ValueError(
                f"pattern='spatial_temporal' chooses between space and time, and {family.root_class} makes single "
                "images; use pattern='stride' there, or another method"
            )

    def renews(self, site: SiteInfo, state: StepState) -> bool:
        """Every so many steps, counted from the first that is not dense."""
        return (state.step - self.schedule.dense_step_count(state.steps)) % self.search_every == 0

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Setup:
        """All masks of the layout, and the queries that are asked.

        Raises:
            ValueError: if there are padding tokens, which must not be attended to; if a single frame leaves no time to
                look along; or if no stride fits the grid.
        """
        if layout.padding:
            raise ValueError(f"grid attention cannot tell {layout.padding} padding tokens from others; leave them out")
        densities = self._densities(site)
        if self._by_lines:
            return self._set_up_lines(layout, densities, device)
        if layout.grid[0] == 1:
            raise ValueError(
                f"pattern='spatial_temporal' needs 2 frames of tokens or more; got a grid of {layout.grid}. Use "
                "pattern='stride', or render more frames"
            )
        first_frame = layout.text is None if self.first_frame is None else self.first_frame
        masks, listed = spatial_temporal_masks(
            layout, densities=densities, block=self.block, first_frame=first_frame, device=device
        )
        probe = probe_of(masks, listed, in_sequence(layout)[self._drawn(site, masks.video)])
        return Setup(densities, count_tensor((0,), device)[:, 0], masks, probe, None)

    def at_step(self, setup: Setup, site: SiteInfo, state: StepState) -> Setup:
        """Which density the schedule lets each head keep at a step, if it has budgets."""
        if not self.schedule.has_budgets:
            return setup
        levels = [setup.densities.index(self._goal(factor)) for factor in self.budget_factors(site, state)]
        return setup._replace(level=count_tensor(tuple(levels), setup.level.device)[:, 0])

    def find_plan(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        setup: Setup,
        *,
        scale: float | None,
        value: torch.Tensor | None = None,
    ) -> SparsePlan:
        """Chooses a mask for every head.

        Args:
            query: ``[batch, heads, tokens, head_dim]``.
            key: likewise.
            setup: from :meth:`set_up`.
            scale: softmax scale, None for the usual one.
            value: likewise, to compare outputs for ``"spatial_temporal"``. None: what is compared is the output that
                values without correlation would give, see :func:`dit_accel.kernels.grid.probe.mask_errors`.
        """
        level = setup.level.expand(query.shape[:2])
        if setup.probe is not None:
            errors = mask_errors(query, key, value, setup.probe, scale=scale).unflatten(-1, (-1, 2))
            choice = errors.argmin(-1).gather(-1, level[..., None])[..., 0] + 2 * level
            return chosen_plan(setup.masks, choice, pattern=self.pattern)
        assert setup.lines is not None  # one of the two is there
        stride, before = best_line(query, key, setup.lines, scale=scale)
        choice = stride + len(setup.lines.strides) * level
        return chosen_plan(setup.masks, choice, before, pattern=self.pattern)

    def search_with_values(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        setup: Setup,
        memory: Memory | None,
        *,
        scale: float | None,
    ) -> tuple[SparsePlan, Memory]:
        """As :meth:`find_plan`, with the values of the call."""
        return self.find_plan(query, key, setup, scale=scale, value=value), ()

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        masks = ("pattern", "density", "block", "probe_rows", "seed", "first_frame", "multiples")
        return self.plain_settings(*masks, "search_every", "compensate", "backend")

    def _set_up_lines(self, layout: TokenLayout, densities: tuple[float, ...], device: torch.device) -> Setup:
        assert self.multiples is not None  # set with the pattern
        strides = line_strides(layout.grid, self.multiples)
        masks, _ = stride_masks(layout, strides, densities=densities, block=self.block, device=device)
        video = in_sequence(layout)[: masks.video].to(device)
        lines = Lines(video[-self.probe_rows :], video, strides)
        return Setup(densities, count_tensor((0,), device)[:, 0], masks, None, lines)

    def _goal(self, factor: float) -> float:
        return min(1.0, self.density * factor)

    def _densities(self, site: SiteInfo) -> tuple[float, ...]:
        """All densities that the schedule may ever ask a site for, ascending."""
        steps = {1.0, *(factor for _, factor in self.schedule.step_budget)}
        layer = dict(self.schedule.layer_budget).get(site.layer, 1.0)
        heads = self.head_factors(site) or (1.0,)
        return tuple(sorted({self._goal(step * layer * head) for step in steps for head in heads}))

    def _drawn(self, site: SiteInfo, tokens: int) -> torch.Tensor:
        """Video tokens to ask, int64 on the CPU: each at most once."""
        count = min(self.probe_rows, tokens)
        if self.seed is None:
            return (torch.arange(count) * 2 + 1) * tokens // (2 * count)
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(site.path.encode()))
        return torch.randperm(tokens, generator=generator)[:count]


def _check_pattern(pattern: str, first_frame: bool | None, multiples: Sequence[int] | None) -> None:
    if pattern not in PATTERNS:
        raise ValueError(f"unknown pattern {pattern!r}; choose one of {', '.join(PATTERNS)}")
    if not isinstance(first_frame, (bool, type(None))):
        raise ValueError(f"first_frame is True, False, or None for True where there is no text; got {first_frame!r}")
    if pattern == "stride" and first_frame is not None:
        raise ValueError("first_frame belongs to pattern='spatial_temporal'; leave it out for 'stride'")
    if pattern != "stride" and multiples is not None:
        raise ValueError("multiples belong to pattern='stride'; leave them out for 'spatial_temporal'")


def _check_numbers(density: float, block: int, probe_rows: int, seed: int | None) -> None:
    number = isinstance(density, (int, float)) and not isinstance(density, bool) and math.isfinite(density)
    if not number or not 0 < density <= 1:
        raise ValueError(f"density is the part of all pairs to keep, in (0, 1], such as 0.25; got {density!r}")
    if block not in (64, 128):
        raise ValueError(f"grid attention works on blocks of 64 or 128 tokens; got {block!r}")
    if not _is_whole(probe_rows, 1):
        raise ValueError(f"probe_rows is a number of queries, 1 or more; got {probe_rows!r}")
    if seed is not None and not (_is_whole(seed, 0) and seed < 2**32):
        raise ValueError(f"seed is a whole number from 0 to 2**32 - 1, or None for an even spread; got {seed!r}")


def _checked_multiples(multiples: Any) -> tuple[int, ...]:
    given = tuple(multiples) if isinstance(multiples, (tuple, list)) else ()
    if not given or not all(_is_whole(factor, 1) for factor in given):
        raise ValueError(f"multiples is a list of whole numbers from 1, such as [1, 2]; got {multiples!r}")
    return given


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
