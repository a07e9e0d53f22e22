"""Controls: small objects that read or change one attention call, at chosen sites, steps and branches.

Editing, guidance and inspection are all controls; they share the one place where attention calls are intercepted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from .clock import StepState
from .layout import TokenLayout

SITE_KINDS = ("self", "cross", "joint", "temporal")


@dataclass(frozen=True)
class SiteInfo:
    """Which attention module a call belongs to.

    Attributes:
        path: name of the module within its root, such as ``"blocks.3.attn1"``.
        kind: ``"self"``, ``"cross"``, ``"joint"`` or ``"temporal"``.
        layer: index among the sites of this kind, in execution order.
        layers: number of sites of this kind in the root.
        expert: attribute name of the root in its pipeline.
    """

    path: str
    kind: str
    layer: int
    layers: int
    expert: str


@dataclass(frozen=True)
class AttentionCall:
    """One attention call as a control sees it: where, and when.

    Attributes:
        site: which attention module.
        state: which step and branch.
        layout: where the query tokens of this site are, and in which order (``layout.order``; that of the keys too
            in self-attention). In a UNet each level has its own grid; ``state.layout`` is that of the root.
    """

    site: SiteInfo
    state: StepState
    layout: TokenLayout


class AttentionControl:
    """Base class; override :meth:`before`, :meth:`after` or :meth:`record`.

    Tensors are ``[batch, heads, tokens, head_dim]`` views. Image-to-video models attend to the image by a second call
    at the same cross-attention site; a control then sees both calls.

    Args:
        kinds: kinds of sites it acts on.
        steps: half-open window ``(start, stop)`` of sampling steps; None for all.
        branches: names of the branches it acts on; None for all.
        layers: indices of the layers it acts on; None for all.
    """

    def __init__(
        self,
        *,
        kinds: Collection[str] = ("self",),
        steps: tuple[int, int] | None = None,
        branches: Collection[str] | None = None,
        layers: Collection[int] | None = None,
    ) -> None:
        unknown = set(kinds) - set(SITE_KINDS)
        if unknown:
            raise ValueError(f"unknown site kind {sorted(unknown)}; choose among {', '.join(SITE_KINDS)}")
        if steps is not None and not 0 <= steps[0] < steps[1]:
            raise ValueError(f"a step window is (start, stop) with 0 <= start < stop; got {steps}")
        self.kinds, self.steps, self.branches, self.layers = kinds, steps, branches, layers

    def acts_on(self, site: SiteInfo) -> bool:
        """Whether this control ever acts at a site."""
        return site.kind in self.kinds and (self.layers is None or site.layer in self.layers)

    def acts_at(self, state: StepState) -> bool:
        """Whether this control acts at a step and branch."""
        in_window = self.steps is None or self.steps[0] <= state.step < self.steps[1]
        return in_window and (self.branches is None or state.branch in self.branches)

    def before(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the query, key and value to use; by default the given ones."""
        return query, key, value

    def after(self, call: AttentionCall, output: torch.Tensor) -> torch.Tensor:
        """Returns the attention output to use; by default the given one."""
        return output

    def record(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Looks at the finished call; changes nothing."""


class AttentionMassRecorder(AttentionControl):
    """Records how much attention each block of queries pays to each block of keys.

    :attr:`masses` maps ``(expert, path, step, branch)`` to a float32 CPU tensor ``[heads, query blocks, key blocks]``,
    averaged over the batch; each row sums to 1. Blocks are runs of positions, whatever the order of tokens;
    padding at the end, which the model's mask hides, is left out. It is the dense softmax of the query and key of the
    call, whatever computed the output, and costs about as much as dense attention.

    Args:
        block: tokens per block.
        **selection: which calls to record, see :class:`AttentionControl`.
    """

    def __init__(
        self,
        block: int = 64,
        *,
        kinds: Collection[str] = ("self",),
        steps: tuple[int, int] | None = None,
        branches: Collection[str] | None = None,
        layers: Collection[int] | None = None,
    ) -> None:
        super().__init__(kinds=kinds, steps=steps, branches=branches, layers=layers)
        if block < 1:
            raise ValueError(f"a block holds at least one token; got {block}")
        self.block = block
        self.masses: dict[tuple[str, str, int, str], torch.Tensor] = {}

    def record(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Adds the block masses of this call to :attr:`masses`."""
        where = (call.site.expert, call.site.path, call.state.step, call.state.branch)
        if call.site.kind != "cross" and call.layout.padding:
            query, key = (part[:, :, : -call.layout.padding] for part in (query, key))
        self.masses[where] = block_mass(query, key, self.block).mean(0).cpu()


def block_mass(query: torch.Tensor, key: torch.Tensor, block: int) -> torch.Tensor:
    """Share of softmax attention that falls into each block of keys, averaged over the queries of each block.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, heads, keys, head_dim]``.
        block: tokens per block; the last block may be short.

    Returns:
        ``[batch, heads, query blocks, key blocks]`` float32; rows sum to 1.
    """
    return torch.stack([sum_blocks(rows.mean(2), block) for rows in attention_rows(query, key, block)], 2)


def attention_rows(query: torch.Tensor, key: torch.Tensor, block: int) -> Iterator[torch.Tensor]:
    """The softmax attention of one block of queries after the other, so that no more than that is held at once.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, heads, keys, head_dim]``.
        block: queries per block; the last block may be short.

    Yields:
        ``[batch, heads, queries of the block, keys]`` float32; rows sum to 1.
    """
    key = key.float().transpose(-1, -2)
    for part in query.float().split(block, 2):
        yield (part @ key * query.shape[-1] ** -0.5).softmax(-1)


def sum_blocks(weights: torch.Tensor, block: int) -> torch.Tensor:
    """Sums runs of ``block`` values of the last axis; the last run may be short."""
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % block))
    return padded.unflatten(-1, (-1, block)).sum(-1)
