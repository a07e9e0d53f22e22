"""`mass_plan`: a plan by exact block mass under a `MassBudget`, one torch operator in eager and compiled code.

One operator, so that both choose the very same blocks, and searches that loop over strips of scores compile quickly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..sparse_plan import PlanStats, SparsePlan
from .always import Ranges, always_blocks
from .budget import MassBudget, select_mass
from .inputs import check_search
from .mass import block_mass
from .select import row_lists

# Spelled out, since older torch releases do not read postponed annotations such as `Tensor | None`.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor? lse, Tensor? counts, int block, float density, bool levels, float? recall, "
    "str recall_over, float min_density, float max_density, int[] text, float? scale, str backend, int width) "
    "-> (Tensor, Tensor, Tensor)"
)


def mass_plan(
    q: Tensor,
    k: Tensor,
    *,
    block: int,
    budget: MassBudget,
    text: Ranges = (),
    lse: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[SparsePlan, Tensor]:
    """Keeps the blocks that hold the most of the softmax, and never waits for the device.

    Args:
        q: `[B, S, H, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, S, H, D]`, dtype and device of q.
        block: Tokens per block of queries and of keys; the last one may be short.
        budget: How many blocks.
        text: Token ranges that see everything and are seen by all.
        lse: Log-sum-exp of an earlier search, float32 `[B, H, S]`, which saves one of two passes; None: exact.
        counts: int64 `[H or 1, 1]` on the device of q: blocks without text for each row, instead of those that the
            density of the budget says; see `select_mass`.
        scale: Positive factor on the scores; `D ** -0.5` by default.
        backend: "auto", "torch" or "triton", see `block_mass`.

    Returns:
        `(plan, lse)`: a plan with lists per batch item and head, whose density is NaN until it is counted, and the
        log-sum-exp that was used.

    Raises:
        ValueError: Arguments do not fit together, or the named backend cannot run the call.
    """
    check_search(q, k, block, block)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"text stands at the same place in queries and keys; got {q.shape[1]} and {k.shape[1]}.")
    cols = -(-k.shape[1] // block)
    # Rows of text are as long as there are blocks.
    width = cols if counts is not None or any(start < stop for start, stop in text) else budget.most(cols)
    indices, lengths, found = mass_lists(
        q.detach(),
        k.detach(),
        lse,
        counts,
        block,
        float(budget.density),
        budget.levels,
        budget.recall,
        budget.recall_over,
        float(budget.min_density),
        float(budget.max_density),
        [int(edge) for pair in text for edge in pair],
        scale,
        backend,
        width,
    )
    plan = SparsePlan(
        q_len=q.shape[1],
        kv_len=k.shape[1],
        block_q=block,
        block_kv=block,
        indices=indices,
        counts=lengths,
        full_counts=lengths,
        stats=PlanStats(math.nan, (), "mass", {"density": budget.density, "recall": budget.recall}),
        always_q=tuple((int(a), int(b)) for a, b in text),
        always_kv=tuple((int(a), int(b)) for a, b in text),
    )
    return plan, found if lse is None else lse


@torch.library.custom_op("dit_accel::mass_lists", mutates_args=(), schema=_SCHEMA)
def mass_lists(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    counts: Tensor | None,
    block: int,
    density: float,
    levels: bool,
    recall: float | None,
    recall_over: str,
    min_density: float,
    max_density: float,
    text: list[int],
    scale: float | None,
    backend: str,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `mass_plan`; use that.

    Args:
        q: As there, and all arguments that are not listed here.
        k: As there.
        lse: As there.
        counts: As there.
        block: As there.
        density: `MassBudget.density`, and so on.
        levels: Likewise.
        recall: Likewise.
        recall_over: Likewise.
        min_density: Likewise.
        max_density: Likewise.
        text: Starts and stops of its ranges in turn.
        scale: As there.
        backend: As there.
        width: Width of the lists, which follows from the other arguments.

    Returns:
        `indices` and `counts` of the plan, and the log-sum-exp; the latter empty if it was given.
    """
    over = "head" if recall_over == "head" else "row"
    budget = MassBudget(density, levels, recall, over, min_density, max_density)  # type: ignore[arg-type]
    mass, found = block_mass(
        q, k, block_q=block, block_kv=block, scale=scale, lse=lse, return_lse=True, backend=backend
    )
    ranges = list(zip(text[::2], text[1::2], strict=True))
    length = q.shape[1]
    always = always_blocks(length, length, block, block, always_q=ranges, always_kv=ranges, device=q.device)
    kept = select_mass(mass, budget, always=always, sinks=touched_blocks(ranges, block), counts=counts)
    return *row_lists(kept, capacity=width), found if lse is None else q.new_empty(0, dtype=torch.float32)


@mass_lists.register_fake
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    counts: Tensor | None,
    block: int,
    density: float,
    levels: bool,
    recall: float | None,
    recall_over: str,
    min_density: float,
    max_density: float,
    text: list[int],
    scale: float | None,
    backend: str,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (q.shape[0], q.shape[2], -(-q.shape[1] // block))
    found = (q.shape[0], q.shape[2], q.shape[1]) if lse is None else (0,)
    return (
        q.new_empty(*rows, width, dtype=torch.int32),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(found, dtype=torch.float32),
    )


def touched_blocks(ranges: Ranges, block: int) -> int:
    """Gives the number of blocks that hold a token of a range."""
    return len({index for start, stop in ranges if start < stop for index in range(start // block, -(-stop // block))})
