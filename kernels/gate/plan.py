"""`gate_plan`: the blocks that a gate keeps, as a plan; one torch operator in compiled code.

One operator, so that compiled code keeps the very blocks that eager code does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import in_full_precision
from ..search.always import Ranges, always_blocks
from ..search.budget_plan import touched_blocks
from ..search.inputs import check_search
from ..search.select import row_lists, select_threshold, select_topk
from ..sparse_plan import PlanStats, SparsePlan
from .gate import StepGate, gate_logits
from .pooling import pooled_keys, pooled_queries


def gate_plan(
    q: Tensor,
    k: Tensor,
    gate: StepGate,
    *,
    block: int,
    text: Ranges = (),
    counts: Tensor | None = None,
    threshold: float | None = None,
    width: int | None = None,
) -> SparsePlan:
    """Keeps the blocks that a gate rates highest, and never waits for the device.

    Blocks that hold text see everything and are seen by all; the gate decides on the others only.

    Args:
        q: `[B, S, H, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, S, H, D]`, dtype and device of q.
        gate: at the noise level of the call, on the device of q.
        block: Tokens per block of queries and of keys; the last one may be short.
        text: Token ranges that see everything and are seen by all.
        counts: Blocks without text that each row keeps, int64, broadcasts to `[B, H, rows]`.
        threshold: Instead: blocks with at least this part of the gate's softmax, in [0, 1); each row keeps its best.
        width: Length of the lists, at least what any row keeps; by default all blocks, which always fits.

    Returns:
        A plan with lists per batch item and head, whose density is NaN until it is counted.

    Raises:
        ValueError: q, k and the gate do not fit together, or not exactly one of counts and threshold is given.
    """
    check_search(q, k, block, block)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"text stands at the same place in queries and keys; got {q.shape[1]} and {k.shape[1]}.")
    if tuple(q.shape[2:]) != tuple(gate.query.shape[:2]):
        made = "{} heads of {} channels".format(*gate.query.shape[:2])
        raise ValueError(f"The gate is made for {made}; the queries have {q.shape[2]} of {q.shape[3]}.")
    if (counts is None) == (threshold is None):
        raise ValueError("Give counts or threshold, one of them.")
    ranges = [(int(a), int(b)) for a, b in text]
    flat = [edge for pair in ranges for edge in pair]
    find = gate_lists if torch.compiler.is_compiling() else _find
    least = None if threshold is None else float(threshold)
    width = -(-k.shape[1] // block) if width is None else width
    indices, found = find(q.detach(), k.detach(), *gate, block, flat, counts, least, width)
    return SparsePlan(
        q_len=q.shape[1],
        kv_len=k.shape[1],
        block_q=block,
        block_kv=block,
        indices=indices,
        counts=found,
        full_counts=found,
        stats=PlanStats(math.nan, (), "gate", {"threshold": threshold}),
        always_q=tuple(ranges),
        always_kv=tuple(ranges),
    )


def text_blocks(text: Ranges, length: int, block: int) -> Tensor:
    """Which blocks hold text, bool `[ceil(length / block)]` on the CPU."""
    return always_blocks(block, length, block, block, always_kv=text)[0]


def select_blocks(
    logits: Tensor, always: Tensor, sinks: int, counts: Tensor | None, threshold: float | None
) -> Tensor:
    """Applies the rule to the blocks without text.

    Args:
        logits: `[B, H, rows, columns]`.
        always: bool `[rows, columns]`, rows and columns of text.
        sinks: Columns of text.
        counts: See `gate_plan`.
        threshold: Likewise.

    Returns:
        bool, shape of `logits`.
    """
    if counts is not None:
        return select_topk(logits, counts + sinks, always=always)
    assert threshold is not None  # gate_plan sees to it
    if sinks == logits.shape[-1]:  # nothing is left to choose among
        return torch.ones_like(logits, dtype=torch.bool)
    share = logits.masked_fill(always.all(0), -math.inf).softmax(-1)
    return select_threshold(share, threshold, always=always, minimum=sinks + 1)


@in_full_precision
def _find(
    q: Tensor,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    shift: Tensor,
    block: int,
    text: list[int],
    counts: Tensor | None,
    threshold: float | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Pools, rates, selects and lists: `indices` and `counts` of the plan."""
    logits = gate_logits(pooled_queries(q, block), pooled_keys(k, block), StepGate(query, key, scale, shift))
    ranges = list(zip(text[::2], text[1::2], strict=True))
    length = q.shape[1]
    always = always_blocks(length, length, block, block, always_q=ranges, always_kv=ranges, device=q.device)
    return row_lists(select_blocks(logits, always, touched_blocks(ranges, block), counts, threshold), capacity=width)


# Spelled out, since older torch releases do not read postponed annotations such as `Tensor | None`.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor query, Tensor key, Tensor scale, Tensor shift, int block, int[] text, "
    "Tensor? counts, float? threshold, int width) -> (Tensor, Tensor)"
)

gate_lists = torch.library.custom_op("dit_accel::gate_lists", _find, mutates_args=(), schema=_SCHEMA)
"""The search as one operator, so that compiled code chooses the very blocks that eager code does."""


@gate_lists.register_fake
def _(
    q: Tensor,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    shift: Tensor,
    block: int,
    text: list[int],
    counts: Tensor | None,
    threshold: float | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    rows = (q.shape[0], q.shape[2], -(-q.shape[1] // block))
    return q.new_empty(*rows, width, dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)
