"""VMoBA: queries choose among cells of the video; layers take turns at cutting it in time, in space and in both.

Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", ICLR 2026, arXiv 2506.23858. The paper
decides for single queries (``kernels/search/cell_reference.py``), which takes a gate for each of them, and kernels
that gather single rows. Here the queries of one plan block decide together, by their mean gate.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..kernels.search.cell_plan import SCOPES, cell_plan
from ..kernels.search.cells import Cells, aligned_block, grid_cells
from .base import DynamicAttnProcessor, check_search_every
from .budget import block_counts, count_tensor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..kernels.search.cell_plan import Scope, Select
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..plan.schedule import Schedule

Grid = tuple[int, int, int]

PARTITIONS = ("temporal", "spatial", "cubes")
USUAL_AMOUNT: dict[str, tuple[float, ...]] = {"top_k": (3, 20, 15), "threshold": (0.25,) * 3}

VMOBA_PRESETS: dict[str, dict[str, Any]] = {
    # Wan 2.1 1.3B, 77 frames of 480x832, a grid of 20x30x52: FastVideo's settings.
    "wan-1.3b-480x832": {
        "chunk": 2,
        "patch": (3, 4),
        "cube": (4, 6, 4),
        "select": "top_k",
        "scope": "query",
        "amount": (3, 20, 15),
        "dense_steps": 12,
        "dense_layers": 0,
    },
    # The same model at 448x832, a grid of 20x28x52; no numbers of cells were published for it.
    "wan-1.3b-448x832": {
        "chunk": 2,
        "patch": (4, 13),
        "cube": (4, 4, 13),
        "select": "threshold",
        "scope": "query",
        "amount": 0.25,
        "dense_steps": 12,
        "dense_layers": 0,
    },
}
"""Published settings by model and size: ``VMoBAAttnProcessor(**VMOBA_PRESETS[name])``; they fit other grids, too."""


class Setup(NamedTuple):
    """What a layer searches in: the cells of its partition, and how many it keeps.

    Attributes:
        cells: of the partition.
        amount: the method's own for this partition, or float64 ``[heads or 1]`` if a schedule has budgets.
    """

    cells: Cells
    amount: float | torch.Tensor


class VMoBAAttnProcessor(DynamicAttnProcessor):
    """Sparse attention over cells of the video: chunks of frames, patches over all frames, and cubes, layer by layer.

    The first sparse layer has chunks of frames, the next patches, the next cubes, and so on. Every block of queries
    keeps its own cells and those whose mean key goes best with its mean query. Cells that reach over the border of the
    grid are cut there. Tokens that are no video (text) see everything and are seen by all; a block of queries that
    holds both counts as text. On a grid of one frame a chunk of frames holds everything, so these layers save nothing.

    Args:
        chunk: frames of a chunk. By default the divisor of the grid's side that is nearest to FastVideo's setting for
            Wan, 2, if one is within a factor of two, else that itself.
        patch: height and width of a patch; by default likewise, of (3, 4).
        cube: frames, height and width of a cube; by default likewise, of (4, 6, 4).
        select: ``"threshold"``, the fewest cells that hold a part of the sum of all gates, brought to between 0 and 1;
            ``"top_k"``, as many for each query.
        scope: among which gates: ``"query"``, those of one block of queries; ``"head"``, those of one head, so that
            important queries have more (the paper's global selection); ``"all"``, those of all heads; ``"cell"``,
            those of one cell, which then chooses its queries (``"threshold"`` only).
        amount: for ``"threshold"`` the part to reach, in (0, 1]; for ``"top_k"`` a number of cells, with one's own.
            One for all partitions or one for each of the three. By default 0.25, or 3, 20 and 15.
        boundaries: ``"cut"``, blocks of keys that hold several cells are kept in part, so that exactly the cells that
            were chosen are seen; ``"keep"``, they are kept whole, which is faster and sees a little more.
        block: tokens per block of queries, 64 or 128; blocks of keys may be shorter, so that cells are whole blocks.
        search_every: sampling steps from one search to the next, counted from the first sparse step.
        compensate: whether blocks that are left out still count by their means; the parts cut out of kept ones do not.
        dense_steps: sampling steps that stay dense.
        dense_layers: layers that stay dense; none by default.
        schedule: instead of these two; its budgets are factors on the numbers of cells, for ``"top_k"`` only, and
            those of heads not for scope ``"all"``.
        backend: kernel backend.

    Raises:
        ValueError: for settings outside these, or budgets that they leave no room for.
    """

    scales_budget = True

    def __init__(
        self,
        *,
        chunk: int | None = None,
        patch: Sequence[int] | None = None,
        cube: Sequence[int] | None = None,
        select: Select = "threshold",
        scope: Scope = "head",
        amount: float | Sequence[float] | None = None,
        boundaries: Literal["cut", "keep"] = "cut",
        block: int = 64,
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
        _check_choices(select, scope, boundaries, block)
        self.chunk = None if chunk is None else _sides("chunk", (chunk,), 1)[0]
        self.patch = None if patch is None else _sides("patch", patch, 2)
        self.cube = None if cube is None else _sides("cube", cube, 3)
        self.select, self.scope, self.boundaries, self.block = select, scope, boundaries, block
        self.amount = USUAL_AMOUNT[select] if amount is None else _amounts(select, amount)
        check_search_every(search_every)
        if select == "threshold":
            self.refuse_budgets("a threshold says by itself how many cells are kept; use select='top_k'")
        if scope == "all":
            self.refuse_head_budgets("scope='all' chooses among all heads together; use scope='head' or 'query'")
        self.search_every = search_every

    def renews(self, site: SiteInfo, state: StepState) -> bool:
        """Every so many steps, counted from the first that is not dense."""
        return (state.step - self.schedule.dense_step_count(state.steps)) % self.search_every == 0

    def partition(self, layer: int) -> str:
        """How a layer cuts the video: ``"temporal"``, ``"spatial"`` or ``"cubes"``."""
        return PARTITIONS[(layer - first_sparse_layer(self.schedule)) % 3]

    def cell(self, partition: str, grid: Grid) -> Grid:
        """Tokens of a cell along (frames, height, width)."""
        if partition == "temporal":
            return self.chunk or _near_divisor(grid[0], 2), grid[1], grid[2]
        if partition == "spatial":
            height, width = self.patch or _near_divisors(grid[1:], (3, 4))
            return grid[0], height, width
        frames, height, width = self.cube or _near_divisors(grid, (4, 6, 4))
        return frames, height, width

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Setup:
        """The cells of the layer's partition.

        Raises:
            ValueError: if there are padding tokens, which nobody must see.
        """
        if layout.padding:
            raise ValueError(f"VMoBA cannot tell {layout.padding} padding tokens from others; leave them out")
        partition = self.partition(site.layer)
        cell = self.cell(partition, layout.grid)
        cut = self.boundaries == "cut"
        # Kernels for GPUs walk blocks in tiles, whose sides are powers of two.
        multiple = 1 if device.type == "cpu" else 32
        cells = grid_cells(
            layout.grid,
            cell,
            block_q=self.block,
            block_kv=aligned_block(layout.grid, cell, self.block, multiple) if cut else self.block,
            start=layout.visual[0],
            length=layout.length,
            sequence=layout.order,
            cut=cut,
            device=device,
        )
        return Setup(cells, self.amount[PARTITIONS.index(partition)])

    def at_step(self, setup: Setup, site: SiteInfo, state: StepState) -> Setup:
        """How many cells the schedule lets the site keep at a step, if it has budgets."""
        if not self.schedule.has_budgets:
            return setup
        own = int(self.amount[PARTITIONS.index(self.partition(site.layer))])
        counts = block_counts(own, len(setup.cells.sizes), self.budget_factors(site, state))
        return setup._replace(amount=count_tensor(counts, setup.cells.sizes.device)[:, 0])

    def find_plan(self, query: torch.Tensor, key: torch.Tensor, setup: Setup, *, scale: float | None) -> SparsePlan:
        """Chooses the cells of each block of queries; see :func:`cell_plan`. The gate knows no softmax scale."""
        q, k = query.transpose(1, 2), key.transpose(1, 2)
        return cell_plan(q, k, setup.cells, select=self.select, scope=self.scope, amount=setup.amount)

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        sides, choices = ("chunk", "patch", "cube"), ("select", "scope", "amount", "boundaries", "block")
        names = (*sides, *choices, "search_every", "compensate", "backend")
        return self.plain_settings(*names)


def first_sparse_layer(schedule: Schedule) -> int:
    """The first layer that is not always dense; from there on partitions take turns."""
    dense = schedule.dense_layers
    if isinstance(dense, int):
        return dense
    return next(layer for layer in range(len(dense) + 1) if layer not in dense)


def _near_divisor(length: int, usual: int) -> int:
    """The divisor of `length` that is nearest to `usual` by ratio, if it is within a factor of two, else `usual`."""
    divisors = [n for n in range(1, length + 1) if length % n == 0 and usual <= 2 * n and n <= 2 * usual]
    return min(divisors, key=lambda n: (abs(math.log(n / usual)), -n), default=usual)


def _near_divisors(lengths: Sequence[int], usual: Sequence[int]) -> tuple[int, ...]:
    return tuple(_near_divisor(length, side) for length, side in zip(lengths, usual, strict=True))


def _sides(name: str, sides: Any, count: int) -> tuple[int, ...]:
    sides = tuple(sides) if isinstance(sides, (tuple, list)) else (sides,)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides)
    if len(sides) != count or not whole:
        meant = {"chunk": "one number", "patch": "(height, width)", "cube": "(frames, height, width)"}[name]
        raise ValueError(f"{name} is {meant} of tokens, each a whole number from 1; got {sides!r}")
    return sides


def _amounts(select: str, amount: Any) -> tuple[float, ...]:
    """One amount for each partition, checked against the range of the rule."""
    amounts = tuple(amount) if isinstance(amount, (tuple, list)) else (amount,) * 3
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in amounts)
    if select == "top_k":
        fits = numbers and all(isinstance(x, int) and x >= 1 for x in amounts)
        valid = "a whole number of cells from 1"
    else:
        fits, valid = numbers and all(0 < x <= 1 for x in amounts), "the part to reach, in (0, 1], such as 0.25"
    if len(amounts) != 3 or not fits:
        raise ValueError(f"amount for select={select!r} is {valid}, or three of these; got {amount!r}")
    return amounts


def _check_choices(select: str, scope: str, boundaries: str, block: int) -> None:
    if select not in USUAL_AMOUNT:
        raise ValueError(f"unknown rule of selection {select!r}; choose one of {', '.join(USUAL_AMOUNT)}")
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; choose one of {', '.join(SCOPES)}")
    if select == "top_k" and scope == "cell":
        raise ValueError("top_k counts the cells of queries, so it has no scope 'cell'; choose query, head or all")
    if boundaries not in ("cut", "keep"):
        raise ValueError(f"unknown boundaries {boundaries!r}; choose cut or keep")
    if block not in (64, 128):
        raise ValueError(f"VMoBA works on blocks of 64 or 128 tokens; got {block}")
