"""`cell_plan`: which cells of a grid each block of queries keeps, by the gate of VMoBA, as a plan.

Source: VMoBA, arXiv 2506.23858.  The gate of a query and a cell is their plain product, query times mean key, and the
cells that are kept are chosen among those of a query, a cell, a head, or all heads.  The paper decides for single
queries (`cell_reference.py`); here the queries of a block decide together.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..bitmap import Bitmap
from ..sparse_plan import PlanStats, SparsePlan
from .cells import SUBSET_CELLS, Cells, packed_words
from .inputs import check_search
from .pooled import differentiable_means
from .running import running_sum
from .select import row_lists

Select = Literal["top_k", "threshold"]
Scope = Literal["query", "cell", "head", "all"]
SCOPES = ("query", "cell", "head", "all")

CUT_BYTES = 1 << 28
"""Of the bitmaps that one call may make for key blocks of many cells; they are kept until the next search."""
_EPS = 1e-6  # gates that differ by less count as equal, as in the authors' code


def cell_plan(
    q: Tensor, k: Tensor, cells: Cells, *, select: Select, scope: Scope, amount: float | Tensor
) -> SparsePlan:
    """Builds a plan from the queries and keys of one attention call, without waiting for the device.

    A row's query is the mean of its block; the mean of its queries' gates would be the same, since the gate is linear
    in the query, and cost a gate for each of them.  The cells of all its tokens are kept.  A block of queries with
    tokens of no cell keeps everything, and everyone keeps those tokens.
    Traceable: while it is being compiled, the search is one operator.

    Args:
        q: `[B, N, H, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, N, H, D]`, dtype and device of q.
        cells: Of the grid, on the device of q.
        select: "top_k" or "threshold", see `select_cells`.
        scope: Among which gates it is selected.
        amount: Its amount, or a tensor of amounts on the device of q, see `select_cells`.

    Returns:
        The plan, with lists per batch item and head; its density is NaN until it is counted.

    Raises:
        ValueError: q, k and the cells do not fit together, "top_k" for scope "cell", or bitmaps of blocks that hold
            many cells would take more than `CUT_BYTES`.
    """
    check_search(q, k, cells.block_q, cells.block_kv)
    if q.shape[1] != cells.order.numel():
        raise ValueError(f"q has {q.shape[1]} tokens, the cells are those of {cells.order.numel()}.")
    _check_memory(q, cells)
    given = f"tensor {tuple(amount.shape)}" if isinstance(amount, Tensor) else amount
    if not isinstance(amount, Tensor):
        amount = torch.full((1,), amount, dtype=torch.float64, device=q.device)
    tensors = [part.detach() if isinstance(part, Tensor) else part for part in cells]
    find: Any = cell_lists if torch.compiler.is_compiling() else _find
    indices, counts, full_counts, slots, words = find(q.detach(), k.detach(), *tensors, amount, select, scope)
    test = None
    if cells.cuts:
        test = Bitmap(slots, torch.cat((cells.words, words)) if cells.crowded.numel() else cells.words, cells.block_kv)
    length = cells.order.numel()
    return SparsePlan(
        q_len=length,
        kv_len=length,
        block_q=cells.block_q,
        block_kv=cells.block_kv,
        indices=indices,
        counts=counts,
        full_counts=counts if test is None else full_counts,
        stats=PlanStats(math.nan, (), "vmoba", {"select": select, "scope": scope, "amount": given}),
        pair_test=test,
        order=cells.order,
    )


def _check_memory(q: Tensor, cells: Cells) -> None:
    rows = -(-cells.order.numel() // cells.block_q)
    size = 4 * q.shape[0] * q.shape[2] * rows * cells.crowded.numel() * cells.block_q * cells.words.shape[2]
    if size > CUT_BYTES:
        raise ValueError(
            f"{cells.crowded.numel()} blocks of keys hold more than {SUBSET_CELLS} cells each, and to cut them the "
            f"bitmaps of one call would take {size >> 20} MiB; the limit is {CUT_BYTES >> 20}. Keep whole blocks "
            "instead, boundaries='keep', or take larger cells."
        )


def gates(q: Tensor, k: Tensor, cells: Cells, block: int) -> Tensor:
    """The gate of each run of `block` queries in cells, and each cell: mean query times mean key, unscaled.

    Args:
        q: `[B, N, H, D]`.
        k: `[B, N, H, D]`.
        cells: Of the grid.
        block: Queries per row, in the order of the cells; 1 for the gates of single queries.

    Returns:
        float32 `[B, H, rows, P]`.
    """
    mean_q = differentiable_means(q.index_select(1, cells.order[: cells.tokens]), block)
    cell_count, largest = cells.members.shape
    real = torch.arange(largest, device=k.device) < cells.sizes[:, None]
    gathered = k.index_select(1, cells.members.flatten()).unflatten(1, (cell_count, largest))
    # A NaN in token 0, which fills up, must not reach other cells: so no product with zero.
    total = gathered.masked_fill(~real[:, :, None, None], 0).sum(2, dtype=torch.float32)
    mean_k = (total / cells.sizes[:, None, None]).transpose(1, 2)
    return mean_q @ mean_k.transpose(-1, -2)


def select_cells(
    gate: Tensor, own: Tensor, queries: Tensor, *, select: Select, scope: Scope, amount: float | Tensor
) -> Tensor:
    """Keeps the best cells.  Each row of gates stands for some queries, and counts as many times.

    All gates of a scope are ranked, those of own cells first, the others by falling gate, equal ones as they come.
    Kept is the shortest beginning of that ranking that reaches the goal: for "top_k" `amount` cells for each query on
    average; for "threshold" the part `amount` of the scope's sum, after its gates were brought to between 0 and 1.

    Args:
        gate: float32 `[B, H, rows, P]`.
        own: bool `[rows, P]`, kept in any case.
        queries: `[rows]`, how many each row stands for.
        select: "top_k" or "threshold".
        scope: "query", the gates of one row; "cell", those of one cell, over rows and heads; "head"; "all", all heads.
        amount: At least 1 for "top_k", 0 to 1 for "threshold".  A tensor `[H]` gives heads amounts of their own, where
            the scope does not go beyond heads; `[1]` is one for all.

    Returns:
        bool `[B, H, rows, P]`.

    Raises:
        ValueError: "top_k" for scope "cell", where no number of cells could be meant.
    """
    if select == "top_k" and scope == "cell":
        raise ValueError("top_k counts cells, so it has no scope 'cell'; choose 'query', 'head' or 'all'.")
    batch, heads, rows, columns = gate.shape
    weight = queries.double()[:, None].expand(gate.shape)
    flat_gate, flat_own, weight = (_by_scope(x, scope) for x in (gate, own.expand(gate.shape), weight))
    value = weight if select == "top_k" else _normalized(flat_gate.double()) * weight
    ranking = flat_gate.masked_fill(flat_own, torch.inf).argsort(dim=-1, descending=True, stable=True)
    held = running_sum(value.gather(-1, ranking))
    if isinstance(amount, Tensor):
        amount = _amount_by_scope(amount, scope)
    if select == "top_k":
        # A scope of whole rows has `amount` cells for each of its queries.
        goal = amount * weight.sum(-1, keepdim=True) / columns
    else:
        goal = amount * held[..., -1:]
    before = torch.cat((torch.zeros_like(held[..., :1]), held[..., :-1]), -1)
    kept = torch.zeros_like(flat_own).scatter_(-1, ranking, before < goal) | flat_own
    if scope == "cell":
        return kept.unflatten(-1, (heads, rows)).permute(0, 2, 3, 1)
    return kept.reshape(batch, heads, rows, columns)


def _by_scope(x: Tensor, scope: Scope) -> Tensor:
    """`[..., gates of a scope]`."""
    if scope == "cell":
        return x.permute(0, 3, 1, 2).flatten(2)
    return x.flatten({"query": 3, "head": 2, "all": 1}[scope])


def _amount_by_scope(amount: Tensor, scope: Scope) -> Tensor:
    """Amounts that broadcast to gates by scope."""
    if amount.numel() == 1:
        return amount
    if scope in ("all", "cell"):
        raise ValueError(f"scope {scope!r} goes over all heads, so there is one amount for all; got {amount.numel()}.")
    return amount[:, None, None] if scope == "query" else amount[:, None]


def _normalized(gate: Tensor) -> Tensor:
    low, high = gate.amin(-1, keepdim=True), gate.amax(-1, keepdim=True)
    spread = high - low
    return (gate - low) / torch.where(spread <= _EPS, 1.0, spread)


def _find(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    tokens: int,
    block_q: int,
    block_kv: int,
    members: Tensor,
    sizes: Tensor,
    own: Tensor,
    queries: Tensor,
    first: Tensor,
    touched: Tensor,
    base: Tensor,
    words: Tensor,
    crowded: Tensor,
    columns: Tensor,
    amount: Tensor,
    select: Select,
    scope: Scope,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Selects and lists: `indices`, `counts` and `full_counts` of the plan, slots of its bitmap, words of rows."""
    parts = (
        order,
        tokens,
        block_q,
        block_kv,
        members,
        sizes,
        own,
        queries,
        first,
        touched,
        base,
        words,
        crowded,
        columns,
    )
    cells = Cells(*parts)
    kept = select_cells(gates(q, k, cells, block_q), own, queries, select=select, scope=scope, amount=amount)
    kept = _with_rest(kept, cells)
    # Of the columns that a key block touches, how many are kept.
    running = torch.nn.functional.pad(kept.int().cumsum(-1, dtype=torch.int32), (1, 0))
    present = running[..., first + touched] - running[..., first]
    some, whole = present > 0, present == touched
    if not cells.cuts:
        indices, counts = row_lists(some)
        return indices, counts, counts.clone(), q.new_empty(0, dtype=torch.int32), words.new_empty(0, *words.shape[1:])
    indices, full_counts = _ordered_lists(some, whole)
    slots, row_words = _slots(kept, cells)
    return indices, some.sum(-1, dtype=torch.int32), full_counts, slots, row_words


def _with_rest(kept: Tensor, cells: Cells) -> Tensor:
    """Adds the column and the rows of tokens in no cell: `[B, H, NQ, P + 1]`."""
    rest = cells.order.numel() - cells.tokens
    rows = -(-cells.order.numel() // cells.block_q)
    kept = torch.nn.functional.pad(kept, (0, 1, 0, rows - kept.shape[2]), value=True)
    if rest:
        kept[:, :, cells.tokens // cells.block_q :] = True
    return kept


def _ordered_lists(some: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Key blocks kept whole, then those kept in part, each ascending, then zeros; and how many are whole."""
    rank = 2 - some.to(torch.uint8) - whole.to(torch.uint8)
    ids = torch.argsort(rank, dim=-1, stable=True).to(torch.int32)
    slots = torch.arange(ids.shape[-1], device=ids.device)
    return torch.where(slots < some.sum(-1, keepdim=True), ids, 0), whole.sum(-1, dtype=torch.int32)


def _slots(kept: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    """Which bitmap each block takes, and the bitmaps of crowded key blocks, one for each of their rows."""
    slot = cells.base.expand(*kept.shape[:3], -1).clone()
    last = kept.shape[-1] - 1
    for i in range(SUBSET_CELLS):
        bit = kept[..., (cells.first + i).clamp(max=last)] & (i < cells.touched)
        slot += bit.long() << i
    rows = kept[..., cells.columns] if cells.crowded.numel() else kept.new_empty(*kept.shape[:3], 0, cells.block_kv)
    words = packed_words(rows)[..., None, :].expand(*rows.shape[:4], cells.block_q, -1).flatten(0, 3)
    numbers = torch.arange(words.shape[0], device=kept.device).view(rows.shape[:4])
    slot[..., cells.crowded] = cells.words.shape[0] + numbers
    return slot.to(torch.int32), words.contiguous()


# Spelled out, since older torch releases do not read postponed annotations.
_TABLES = (
    "Tensor order, int tokens, int block_q, int block_kv, Tensor members, Tensor sizes, Tensor own, Tensor queries, "
    "Tensor first, Tensor touched, Tensor base, Tensor words, Tensor crowded, Tensor columns"
)
_SCHEMA = (
    f"(Tensor q, Tensor k, {_TABLES}, Tensor amount, str select, str scope) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

cell_lists = torch.library.custom_op("dit_accel::cell_lists", _find, mutates_args=(), schema=_SCHEMA)
"""The search as one operator, so that compiled code chooses the very cells that eager code does."""


@cell_lists.register_fake
def _(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    tokens: int,
    block_q: int,
    block_kv: int,
    members: Tensor,
    sizes: Tensor,
    own: Tensor,
    queries: Tensor,
    first: Tensor,
    touched: Tensor,
    base: Tensor,
    words: Tensor,
    crowded: Tensor,
    columns: Tensor,
    amount: Tensor,
    select: str,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = (q.shape[0], q.shape[2], -(-order.shape[0] // block_q))
    width, blocks = words.shape[2], first.shape[0]
    cuts = words.shape[0] > 0 or crowded.shape[0] > 0

    def ints(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.int32)

    entries = rows[0] * rows[1] * rows[2] * crowded.shape[0]
    slots = ints(*rows, blocks) if cuts else ints(0)
    return ints(*rows, blocks), ints(*rows), ints(*rows), slots, ints(entries, block_q, width)
