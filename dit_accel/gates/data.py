"""What block gates are trained on: pooled queries and keys of some attention calls, and the maps of their teacher."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..controls import AttentionControl
from ..kernels.gate.plan import text_blocks
from ..kernels.gate.pooling import pooled_keys, pooled_queries
from ..kernels.gate.teacher import block_maps

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import AttentionCall, SiteInfo
    from ..layout import TokenLayout

SiteKey = tuple[str, str]  # expert and path


@dataclass
class SiteSamples:
    """The recorded calls of one attention module; all of one layout.

    Attributes:
        site: which module.
        layout: of all calls.
        block: tokens per block.
        rows: query blocks that are looked at, ascending, ``[rows]``; those without text, or some of them.
        columns: bool ``[blocks]``, key blocks without text, among which the gate chooses.
        queries: of each call, mean queries ``[heads, rows, head_dim]`` float16.
        keys: likewise, pooled keys ``[heads, blocks, 3 * head_dim]`` float16.
        greatest: likewise, the greatest weight in each block ``[heads, rows, blocks]`` float16, over that of its row.
        share: likewise, the share of the softmax in each block.
        timesteps: the ``timestep`` that the model was given.
    """

    site: SiteInfo
    layout: TokenLayout
    block: int
    rows: Tensor
    columns: Tensor
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    greatest: list[Tensor] = field(default_factory=list)
    share: list[Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)


class GateRecorder(AttentionControl):
    """Records what gates learn from, at some steps of each generation; costs a few times what dense attention does.

    :attr:`sites` maps ``(expert, path)`` to the calls of each site, one entry for each batch item.

    Args:
        block: tokens per block of queries and of keys.
        samples: how many sampling steps are recorded, spread evenly; None for all.
        rows: query blocks that are kept of each call, spread evenly; None for all.
        kinds: kinds of sites; those the model lacks are passed over.

    Raises:
        ValueError: if a number is below 1.
    """

    def __init__(
        self,
        block: int = 64,
        *,
        samples: int | None = None,
        rows: int | None = None,
        kinds: Collection[str] = ("self", "joint"),
    ) -> None:
        super().__init__(kinds=kinds)
        for name, value in (("a block", block), ("recorded steps", samples), ("recorded rows", rows)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: give a whole number of at least 1; got {value}")
        self.block, self.samples, self.rows = block, samples, rows
        self.sites: dict[SiteKey, SiteSamples] = {}

    def acts_at(self, state: StepState) -> bool:
        """Whether a step is one of those recorded.

        Raises:
            ValueError: if only some are wanted and nobody says how many steps there are.
        """
        if self.samples is None:
            return True
        if state.steps is None:
            raise ValueError("nobody says how many steps there are; record all, or call clock.set_step(step, steps)")
        return state.step in spread(state.steps, self.samples)

    def record(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Adds one call.

        Raises:
            ValueError: if its output is not finite, its tokens are not those of earlier calls, some of them are
                padding, or there is no timestep.
        """
        _check_finite(call, output)
        site = self._site(call)
        q, k = query.transpose(1, 2), key.transpose(1, 2)
        greatest, share = block_maps(q, k, self.block, rows=site.rows)
        queries = pooled_queries(q, self.block)[:, :, site.rows.to(q.device)]
        keys = pooled_keys(k, self.block)
        step = _timestep(call.state)
        for item in range(q.shape[0]):
            site.queries.append(queries[item].half().cpu())
            site.keys.append(keys[item].half().cpu())
            # Single weights of long sequences are too small for 16 bits; only ratios within a row count.
            top = greatest[item] / greatest[item].amax(-1, keepdim=True)
            site.greatest.append(top.half().cpu())
            site.share.append(share[item].half().cpu())
            site.timesteps.append(step)

    def _site(self, call: AttentionCall) -> SiteSamples:
        where = (call.site.expert, call.site.path)
        if where not in self.sites:
            _check_layout(call.layout)
            text = (call.layout.text,) if call.layout.text else ()
            columns = ~text_blocks(text, call.layout.length, self.block)
            rows = columns.nonzero().flatten()
            if self.rows is not None:
                rows = rows[torch.tensor(spread(rows.numel(), self.rows))]
            self.sites[where] = SiteSamples(call.site, call.layout, self.block, rows, columns)
        site = self.sites[where]
        if site.layout != call.layout:
            raise ValueError(
                f"{call.site.path} was called with a grid of {site.layout.grid} tokens and then of "
                f"{call.layout.grid}; record generations of one size"
            )
        return site


def spread(count: int, parts: int) -> list[int]:
    """The middles of ``parts`` equal parts of ``count`` things; everything if there are not more."""
    return [int((part + 0.5) * count / parts) for part in range(parts)] if parts < count else [*range(count)]


def _check_finite(call: AttentionCall, output: Tensor) -> None:
    """Refuses what gates would learn nothing from; their training would blame the learning rate."""
    if not torch.isfinite(output).all():
        raise ValueError(f"{call.site.path} gave NaN or infinity at step {call.state.step}; try float32 or bfloat16")


def _check_layout(layout: TokenLayout) -> None:
    if layout.padding:
        raise ValueError(f"gates cannot tell {layout.padding} padding tokens from others; leave them out")
    if layout.order is not None:
        raise ValueError("gates see blocks of tokens in raster order; leave out the token permutation")


def _timestep(state: StepState) -> float:
    if state.timestep is None:
        raise ValueError("gates are conditioned on the timestep, and the model was called without one")
    return float(torch.as_tensor(state.timestep).max())
