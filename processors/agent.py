"""Agent attention: queries and keys meet in a few agent tokens (Han et al., ECCV 2024, arXiv 2312.08874)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from ..kernels.agent.attention import SECOND_SCALE_POWER, SHORTCUT, agent_attention
from ..kernels.agent.joint import agent_attention_beside, full_plan
from ..kernels.agent.merged import merged_attention, merged_counts
from ..kernels.agent.merging import draw_destinations
from ..kernels.agent.pooling import cells_by_number, cells_by_tile, pooled_agents
from ..kernels.permute import permuted, put_back
from ..plan.schedule import step_index
from .base import PUBLISHED_WARM_UP
from .operator import OperatorAttnProcessor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..families import Family
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule

MODES = ("auto", "merge", "pool")
DOWNSAMPLES = (1, 2, 4, 8)
_LEVELS = ("down_blocks", "mid_block", "up_blocks")  # where the attention of UNets is


class Merging(NamedTuple):
    """One call among merged tokens; ``cell`` and ratios are those of the stage."""

    grid: tuple[int, int, int]
    cell: tuple[int, int, int]
    ratio: float
    agent_ratio: float
    destinations: torch.Tensor


class Pooling(NamedTuple):
    """Calls through pooled agents. Tokens besides the grid are exact; the two plans are for these, None without."""

    grid: tuple[int, int, int]
    cells: tuple[int, int, int]
    start: int
    length: int
    gather: SparsePlan | None
    exact: SparsePlan | None
    order: torch.Tensor | None  # of a token permutation


class Refused(NamedTuple):
    """Pooling that would save nothing at a level of a UNet, which matters only if the level takes part."""

    grid: tuple[int, int, int]
    reason: str


class AgentAttnProcessor(OperatorAttnProcessor):
    """Attention through agents: made by merging similar tokens in UNets, by pooling queries in transformers.

    In UNets it is AgentSD: similar tokens are merged, agents are queries of tokens merged further, and attention goes
    through them where that takes fewer scores. In every square of tokens one is drawn that others may be merged into,
    the same for all items of a batch and all branches of guidance. Early steps take few agents, later ones merge
    tokens only. Pairs are chosen by the keys of all heads, for the original's hidden states are not seen here; the
    rest is the same, see ``kernels/agent/merged.py``.

    In transformers agents are mean queries of tiles of the token grid. Tokens that are not on the grid (text and
    reference images) see everything exactly and are seen exactly by all, in one softmax
    (``kernels/agent/joint.py``).

    Args:
        mode: ``"merge"`` or ``"pool"``; ``"auto"`` merges in UNets and pools elsewhere.
        cell: merge: side of the squares of tokens in each of which one is drawn, for the early and the later steps.
        merge: merge: part of the tokens that are merged into others, in [0, 1), for both or for each.
        agent_ratio: merge: the same for the agents, in [0, 1]; there is at least one agent for each square.
        switch: merge: where the later steps begin; a float is a fraction of all steps, rounded up, an int a step
            counted from 0.
        max_downsample: sites whose grid is smaller than that of the latent, side by side, by more than this stay
            dense: 1, 2, 4 or 8. Of UNets alone.
        random: merge: whether tokens are drawn; otherwise it is the first of each square.
        seed: merge: of these draws, together with the step and the layer.
        agents: pool: tokens of a tile (frames, height, width), or the number of agents at most.
        second_scale_power: scale of the scores with agents is the usual one to this power, in (0, 1].
        shortcut: part of the values that is added to outputs through agents, in [0, 1]; by default 0.075 where tokens
            are merged, as published, and 0 where agents are pooled.
        block: pool: tokens per block of the kernels that run what is exact, 64 or 128.
        dense_steps: sampling steps that stay dense. By default none where tokens are merged, as published, and 0.24
            of all where agents are pooled, of which nothing is published.
        dense_layers: layers that stay dense; by default none.
        schedule: instead of these two, without budgets.
        backend: kernel backend of what is exact where agents are pooled.

    Raises:
        ValueError: for settings outside these.
    """

    def __init__(
        self,
        *,
        mode: Literal["auto", "merge", "pool"] = "auto",
        cell: int | Sequence[int] = (4, 2),
        merge: float | Sequence[float] = 0.4,
        agent_ratio: float | Sequence[float] = (0.95, 0.5),
        switch: int | float = 0.4,
        max_downsample: int = 1,
        random: bool = True,
        seed: int = 0,
        agents: int | Sequence[int] = (1, 2, 4),
        second_scale_power: float = SECOND_SCALE_POWER,
        shortcut: float | None = None,
        block: int = 128,
        dense_steps: int | float | None = None,
        dense_layers: int | Collection[int] | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        _check_choices(mode, max_downsample, random, block)
        self.own_warm_up = dense_steps is None and (
            schedule is None or (isinstance(schedule, Mapping) and "dense_steps" not in schedule)
        )
        self.usual_dense_steps = 0 if mode == "merge" else PUBLISHED_WARM_UP
        super().__init__(dense_steps=dense_steps, dense_layers=dense_layers, schedule=schedule, backend=backend)
        self._merge_schedule = replace(self.schedule, dense_steps=0) if self.own_warm_up else self.schedule
        self.mode, self.max_downsample, self.random, self.block = mode, max_downsample, random, block
        self.seed = _checked_int("seed", seed, 0)
        self.cell = _of_both("cell", cell, lambda side: _checked_int("cell", side, 1))
        self.merge = _of_both("merge", merge, lambda part: _checked_part("merge", part, "[0, 1)"))
        self.agent_ratio = _of_both("agent_ratio", agent_ratio, lambda part: _checked_part("agent_ratio", part))
        self.switch = _checked_start(switch)
        self.agents = _checked_agents(agents)
        self.second_scale_power = _checked_part("second_scale_power", second_scale_power, "(0, 1]")
        self.shortcut = None if shortcut is None else _checked_part("shortcut", shortcut)

    def check_family(self, family: Family) -> None:
        """Refuses to merge tokens of what is no UNet: rotary embeddings and text do not survive it."""
        super().check_family(family)
        if self.mode == "merge" and "down_blocks" not in family.block_lists:
            raise ValueError(
                f"mode='merge' is for UNets, whose attention sees image tokens alone; {family.root_class} is none. "
                "Use mode='pool' or 'auto'"
            )

    def check_sites(self, sites: Collection[SiteInfo]) -> None:
        """Refuses a UNet that does not attend at the resolutions asked for."""
        levels = [int(site.path.split(".")[1]) for site in sites if site.path.startswith("down_blocks.")]
        if levels and 2 ** min(levels) > self.max_downsample:
            raise ValueError(
                f"max_downsample={self.max_downsample} reaches no self-attention of this UNet, whose finest is at a "
                f"grid {2 ** min(levels)} times smaller than the latent; use max_downsample={2 ** min(levels)} or more"
            )

    def is_sparse(self, site: SiteInfo, state: StepState) -> bool:
        """As all methods, with the warm-up of the mode that the site is in."""
        schedule = self._merge_schedule if self._merges(site) else self.schedule
        return site.kind in self.kinds and not schedule.is_dense(state.step, state.steps, site.layer)

    def warm_up_steps(self, sites: Iterable[SiteInfo], steps: int | None) -> int:
        """As all methods; sites that merge tokens have a warm-up of their own."""
        merges = any(site.kind in self.kinds and self._merges(site) for site in sites)
        return (self._merge_schedule if merges else self.schedule).dense_step_count(steps)

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Any:
        """The layout and device where tokens are merged, a :class:`Pooling` where agents are pooled.

        As many agents as would save nothing are refused, at a level of a UNet when it takes part (:meth:`at_step`).

        Raises:
            ValueError: if there are padding tokens, tokens to merge that are not on the grid or not in its order, or
                too many agents.
        """
        if layout.padding:
            raise ValueError(f"agents cannot tell {layout.padding} padding tokens from others; leave them out")
        if not self._merges(site):
            pooling = self._pooling(layout, device)
            if isinstance(pooling, Refused) and not site.path.startswith(_LEVELS):
                raise ValueError(pooling.reason)
            return pooling
        if layout.order is not None or layout.length != math.prod(layout.grid):
            raise ValueError(
                f"{site.path} has tokens that are not on the image's grid, or not row by row, and merging goes by it; "
                "use mode='pool'"
            )
        return layout, device

    def at_step(self, setup: Any, site: SiteInfo, state: StepState) -> Any:
        """The set-up of the stage, with the tokens that others are merged into; None at grids that are too small.

        Raises:
            ValueError: if nobody says how many steps there are, and ``switch`` is a fraction of them, or if there are
                as many agents as would save nothing.
        """
        merges = not isinstance(setup, (Pooling, Refused))
        grid = setup[0].grid if merges else setup.grid
        if site.path.startswith(_LEVELS) and _downsample(state.layout.grid, grid) > self.max_downsample:
            return None
        if isinstance(setup, Refused):
            raise ValueError(setup.reason)
        if not merges:
            return setup
        stage = int(state.step >= step_index("switch", self.switch, state.steps))
        cell = (1, self.cell[stage], self.cell[stage])
        drawn = draw_destinations(grid, cell, self._generator(site, state) if self.random else None)
        return Merging(grid, cell, self.merge[stage], self.agent_ratio[stage], drawn.to(setup[1], non_blocking=True))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, setup: Any, *, scale: float | None
    ) -> torch.Tensor:
        """Among merged tokens or through pooled agents, as the set-up says.

        Raises:
            ValueError: if there are other keys than tokens of the layout.
        """
        length = setup.length if isinstance(setup, Pooling) else math.prod(setup.grid)
        if query.shape[2] != length or key.shape[2] != length:
            raise ValueError(
                f"agents are made for {length} tokens that attend to each other; this call has {query.shape[2]} "
                f"queries and {key.shape[2]} keys. Leave its layer dense by dense_layers"
            )
        if isinstance(setup, Pooling):
            return self._through_pooled(query, key, value, setup, scale)
        return merged_attention(
            query,
            key,
            value,
            setup.destinations,
            ratio=setup.ratio,
            agent_ratio=setup.agent_ratio,
            scale=scale,
            second_scale_power=self.second_scale_power,
            shortcut=SHORTCUT if self.shortcut is None else self.shortcut,
        )

    def cost(self, setup: Any) -> float:
        """Scores of the softmaxes over those of dense attention; cosines, by which tokens are merged, come on top."""
        if isinstance(setup, Pooling):
            visual, agents = math.prod(setup.grid), math.prod(setup.cells)
            beside = setup.length - visual
            return float(beside * (setup.length + visual) + 2 * agents * visual) / setup.length**2
        tokens = math.prod(setup.grid)
        kept, agents = merged_counts(tokens, setup.destinations.shape[1], setup.ratio, setup.agent_ratio)
        return (2 * agents * kept if agents else kept * kept) / tokens**2

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name, as plain values of JSON."""
        names = ("mode", "cell", "merge", "agent_ratio", "switch", "max_downsample", "random", "seed", "agents")
        more = ("second_scale_power", "shortcut", "block", "backend")
        return self.plain_settings(*names, *more) | ({"dense_steps": None} if self.own_warm_up else {})

    def _merges(self, site: SiteInfo) -> bool:
        return self.mode == "merge" or (self.mode == "auto" and site.path.startswith(_LEVELS))

    def _generator(self, site: SiteInfo, state: StepState) -> torch.Generator:
        """On the CPU whatever the device, so that draws are the same everywhere."""
        key = hashlib.blake2b(f"{self.seed} {site.layer} {state.step}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)

    def _pooling(self, layout: TokenLayout, device: torch.device) -> Pooling | Refused:
        grid, (start, stop) = layout.grid, layout.visual
        by_number = isinstance(self.agents, int)
        cells = cells_by_number(grid, self.agents) if by_number else cells_by_tile(grid, self.agents)
        count, visual, beside = math.prod(cells), stop - start, layout.length - (stop - start)
        if 2 * count >= visual:
            most = (visual - 1) // 2
            way_out = f"give a number from 1 to {most}, or a larger tile" if most else "leave attention dense"
            reason = f"agents={self.agents} makes {count} agents for {visual} tokens, which saves nothing; {way_out}"
            return Refused(grid, reason)
        plans = [full_plan(*sizes, self.block, device) for sizes in ((count, visual), (visual, beside)) if beside]
        gather, exact = plans or (None, None)
        return Pooling(grid, cells, start, layout.length, gather, exact, layout.order)

    def _through_pooled(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, setup: Pooling, scale: float | None
    ) -> torch.Tensor:
        query, key, value = (put_back(x, setup.order) for x in (query, key, value))
        start, stop = setup.start, setup.start + math.prod(setup.grid)
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        agents = pooled_agents(q, setup.grid, setup.cells)
        options: dict[str, Any] = {"second_scale_power": self.second_scale_power, "shortcut": self.shortcut or 0.0}
        if setup.gather is None or setup.exact is None:
            out = agent_attention(q, k, v, agents, scale=scale, **options)
        else:
            rest = [torch.cat((x[:, :, :start], x[:, :, stop:]), 2) for x in (query, key, value)]
            options |= {"gather": setup.gather, "exact": setup.exact, "backend": self.backend}
            out = agent_attention_beside(q, k, v, agents, rest[1], rest[2], scale=scale, **options)
            exact = F.scaled_dot_product_attention(rest[0], key, value, scale=scale)
            out = torch.cat((exact[:, :, :start], out, exact[:, :, start:]), 2)
        return permuted(out, setup.order)


def _downsample(root: tuple[int, int, int], grid: tuple[int, int, int]) -> int:
    """How much smaller a grid is than the root's, side by side; as in ToMeSD."""
    return math.ceil(math.sqrt(math.prod(root) // math.prod(grid)))


def _check_choices(mode: object, max_downsample: object, random: object, block: object) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    if isinstance(max_downsample, bool) or max_downsample not in DOWNSAMPLES:
        raise ValueError(f"max_downsample is 1, 2, 4 or 8; got {max_downsample!r}")
    if not isinstance(random, bool):
        raise ValueError(f"random is True or False; got {random!r}")
    if isinstance(block, bool) or block not in (64, 128):
        raise ValueError(f"exact parts run on blocks of 64 or 128 tokens; got {block!r}")


def _of_both(name: str, given: Any, checked: Any) -> Any:
    """One value for the early and one for the later steps."""
    both = tuple(given) if isinstance(given, (list, tuple)) else (given, given)
    if len(both) != 2:
        raise ValueError(f"{name} is one value, or two: for the early and the later steps; got {given!r}")
    return checked(both[0]), checked(both[1])


def _checked_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} takes whole numbers, {least} or more; got {value!r}")
    return value


def _checked_part(name: str, value: Any, valid: str = "[0, 1]") -> float:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    if not fits or (valid[0] == "(" and value == 0) or (valid[-1] == ")" and value == 1):
        raise ValueError(f"{name} takes numbers in {valid}; got {value!r}")
    return float(value)


def _checked_start(switch: Any) -> int | float:
    if isinstance(switch, float) and 0 <= switch <= 1:
        return switch
    if isinstance(switch, float):
        raise ValueError(f"switch is a fraction of all steps in [0, 1], or a whole number of steps; got {switch!r}")
    return _checked_int("switch", switch, 0)


def _checked_agents(agents: Any) -> Any:
    if not isinstance(agents, (list, tuple)):
        return _checked_int("agents", agents, 1)
    if len(agents) != 3:
        raise ValueError(f"agents is a number, or a tile (frames, height, width); got {agents!r}")
    return tuple(_checked_int("a side in agents", side, 1) for side in agents)
