"""Learned gates (SeerAttention, Gao et al., arXiv 2410.13276): a small trained net says which blocks matter.

The net learns from the model's own attention while the model stays as it is (``dit-accel train-gate``). Ours sees both
directions of time, and is told the noise level.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.gate.gate import GateWeights, StepGate, at_level
from ..kernels.gate.plan import gate_plan, text_blocks
from .base import DynamicAttnProcessor, check_search_every
from .budget import block_counts, count_tensor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..families import Family
    from ..gates.files import Gates
    from ..kernels.search.always import Ranges
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule

DENSITY = 0.25


@dataclass(frozen=True)
class GateSetup:
    """A site's gate on its device, and what there is to choose among.

    Attributes:
        weights: of the gate.
        block: tokens per block.
        text: token ranges that see everything and are seen by all.
        blocks: blocks without text.
        width: blocks that a row of the lists has room for.
        gate: at the noise level of the coming call; None before :meth:`LearnedGateAttnProcessor.at_step`.
        counts: blocks without text that a row keeps then, int64 ``[heads or 1, 1]``; None for a threshold.
    """

    weights: GateWeights
    block: int
    text: Ranges
    blocks: int
    width: int
    gate: StepGate | None = None
    counts: torch.Tensor | None = None


class LearnedGateAttnProcessor(DynamicAttnProcessor):
    """Sparse attention over the blocks that a trained gate rates highest, from pooled queries and keys.

    Text tokens see everything and are seen by all, beside the density. Blocks that hold both text and image count as
    text. Gates fit one model; they are read when the method is installed or first used.

    Args:
        gates: a file that ``dit-accel train-gate`` wrote, or the name of a model whose gates ship with the package.
        density: part of the blocks that every row keeps, in (0, 1]; 0.25 by default.
        threshold: instead of a density: the least part of the gate's softmax that a block must have to be kept, in
            (0, 1), such as 0.002 (the paper's are 0.0005 to 0.005); every row keeps at least its best block.
        block: tokens per block, 64 or 128; None for what the gates were trained with, the only one they take.
        search_every: sampling steps from one choice of blocks to the next, counted from the first sparse step.
        compensate: whether blocks that are left out still count by their means.
        dense_steps: sampling steps that stay dense; 12 of 50 by default, hence the fraction 0.24.
        dense_layers: layers that stay dense; by default the first.
        schedule: instead of these two; its budgets are factors on the density.
        backend: kernel backend.

    Raises:
        ValueError: for settings outside these, or budgets beside a threshold.
    """

    usual_dense_layers = 1
    scales_budget = True

    def __init__(
        self,
        *,
        gates: str | Path = "shapes-wan",
        density: float | None = None,
        threshold: float | None = None,
        block: int | None = None,
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
        if not isinstance(gates, (str, Path)) or not str(gates):
            raise ValueError(f"gates is the path of a file, or the name of a shipped model; got {gates!r}")
        _check_rule(density, threshold)
        if block not in (None, 64, 128):
            raise ValueError(f"gates work on blocks of 64 or 128 tokens; got {block!r}")
        check_search_every(search_every)
        if threshold is not None:
            self.refuse_budgets("threshold says by itself how many blocks are kept; give a density instead")
        self.gates = str(gates)
        if density is None and threshold is None:
            density = DENSITY
        self.density = None if density is None else float(density)
        self.threshold, self.asked_block, self.search_every = threshold, block, search_every
        self._loaded: Gates | None = None

    @property
    def block(self) -> int:  # type: ignore[override]
        """Tokens per block, as the gates were trained."""
        return self.load().block

    def load(self) -> Gates:
        """The gates; reads their file at the first call.

        Raises:
            ValueError: if there is no such file, or it holds no gates, or gates of another block than asked for.
        """
        if self._loaded is None:
            from ..gates.files import load_gates

            found = load_gates(self.gates)
            if self.asked_block not in (None, found.block):
                raise ValueError(
                    f"these gates are for blocks of {found.block} tokens; leave out block={self.asked_block}, or "
                    f"train others with dit-accel train-gate --block {self.asked_block}"
                )
            self._loaded = found
        return self._loaded

    def check_family(self, family: Family) -> None:
        """Refuses models that the gates were not trained on, as far as the class tells."""
        super().check_family(family)
        self.load().check_family(family.root_class)

    def check_sites(self, sites: Mapping[SiteInfo, tuple[int, int]]) -> None:
        """Refuses models with other attention modules than the gates were trained on."""
        for site, (heads, head_dim) in sites.items():
            self.load().check_heads(site, heads, head_dim)

    def renews(self, site: SiteInfo, state: StepState) -> bool:
        """Every so many steps, counted from the first that is not dense."""
        return (state.step - self.schedule.dense_step_count(state.steps)) % self.search_every == 0

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> GateSetup:
        """The gate of a site, and where the text is.

        Raises:
            ValueError: if the gates are not those of the model, or tokens are padding or not in raster order.
        """
        if layout.padding:
            raise ValueError(f"gates cannot tell {layout.padding} padding tokens from others; leave them out")
        if layout.order is not None:
            raise ValueError("gates are trained on blocks in raster order; leave out the token permutation")
        gates = self.load()
        weights = GateWeights(*(part.to(device) for part in gates.gate_of(site)))
        text = (layout.text,) if layout.text else ()
        free = int((~text_blocks(text, layout.length, gates.block)).sum())
        width = -(-layout.length // gates.block)
        if self.density is not None and not text and not self.schedule.has_budgets:
            width = block_counts(self.density, free, (1.0,))[0]  # lists are kept from step to step at every site
        return GateSetup(weights, gates.block, text, free, width)

    def at_step(self, setup: GateSetup, site: SiteInfo, state: StepState) -> GateSetup:
        """The gate at the noise level of a call, worked out on the device, and how many blocks it may keep.

        Raises:
            ValueError: if the model is called without a timestep.
        """
        if state.timestep is None:
            raise ValueError("gates are told the timestep, and the model was called without one; pass timestep=")
        device = setup.weights.query.device
        # Where each token has a timestep of its own, the noisiest counts, as for the clock.
        level = torch.as_tensor(state.timestep).to(device, torch.float32, non_blocking=True)
        level = level.amax() / self.load().levels
        counts = None
        if self.density is not None:
            kept = block_counts(self.density, setup.blocks, self.budget_factors(site, state))
            counts = count_tensor(kept, device)
        return replace(setup, gate=at_level(setup.weights, level), counts=counts)

    def find_plan(
        self, query: torch.Tensor, key: torch.Tensor, setup: GateSetup, *, scale: float | None
    ) -> SparsePlan:
        """Pools, rates and keeps blocks; see :func:`gate_plan`. The gate has a scale of its own."""
        assert setup.gate is not None  # at_step runs before every call
        return gate_plan(
            query.transpose(1, 2),
            key.transpose(1, 2),
            setup.gate,
            block=setup.block,
            text=setup.text,
            counts=setup.counts,
            threshold=self.threshold,
            width=setup.width,
        )

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        plain = self.plain_settings("gates", "density", "threshold", "search_every", "compensate", "backend")
        return plain | {"block": self.asked_block}


def _check_rule(density: object, threshold: object) -> None:
    if density is not None and threshold is not None:
        raise ValueError(f"density={density} and threshold={threshold} are two rules; give one of them")
    if density is not None and not (_is_number(density) and 0 < density <= 1):  # type: ignore[operator]
        raise ValueError(f"density is the part of all blocks to keep, in (0, 1], such as 0.25; got {density!r}")
    if threshold is not None and not (_is_number(threshold) and 0 < threshold < 1):  # type: ignore[operator]
        raise ValueError(f"threshold is a part of the gate's softmax, in (0, 1), such as 0.002; got {threshold!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
