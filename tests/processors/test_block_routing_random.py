"""Block routing on random small sequences against its formulas, in loops over blocks and tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.layout import TokenLayout
from dit_accel.processors import BlockRoutingAttnProcessor

SITE = SiteInfo("blocks.1.attn1", "self", 1, 3, "transformer")
DIM = 8
CLEAR = 1e-4  # relative difference that rounding in single precision cannot bridge
amounts = st.one_of(
    st.tuples(st.just("top_k"), st.one_of(st.floats(0.1, 0.7), st.integers(1, 6))),
    st.tuples(st.just("top_p"), st.floats(0.2, 0.8)),
    st.tuples(st.just("threshold"), st.floats(0.3, 2)),
)


def cut(start: int, stop: int, size: int) -> list[range]:
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def mean_logit(logits: list[list[float]], rows: range, columns: range) -> float:
    return sum(logits[q][kv] for q in rows for kv in columns) / len(rows) / len(columns)


def block_weight(score: str, logits: list[list[float]], rows: range, columns: range, block: int) -> float:
    """What one block weighs among those of its row, up to a factor that all of them share."""
    if score == "pooled":
        return len(columns) * math.exp(mean_logit(logits, rows, columns))
    if score == "mass":
        return sum(
            math.exp(logits[q][kv]) / sum(math.exp(other) for other in logits[q]) for q in rows for kv in columns
        )
    return sum(
        len(part_q) * len(part_kv) * math.exp(mean_logit(logits, part_q, part_kv))
        for part_q in cut(rows.start, rows.stop, block // 4)
        for part_kv in cut(columns.start, columns.stop, block // 4)
    )


def chosen(select: str, amount: Any, weights: list[float], always: set[int]) -> set[int]:
    """The blocks of one row: those that are always kept count first, then the heaviest."""
    total = sum(weights)
    ranked = sorted(range(len(weights)), key=lambda j: (j not in always, -weights[j]))
    if select == "top_k":
        count = amount if isinstance(amount, int) else math.ceil(amount * len(weights) - 1e-9)
        return always | set(ranked[: max(1, count)])
    if select == "threshold":
        line = amount * total / len(weights)
        assume(all(abs(weight / line - 1) > CLEAR for weight in weights))
        return always | {j for j, weight in enumerate(weights) if weight >= line} or {ranked[0]}
    kept: set[int] = set()
    for j in ranked:
        held = sum(weights[i] for i in kept) / total
        assume(abs(held - amount) > CLEAR)
        if held >= amount:
            break
        kept.add(j)
    return kept | always


def wanted(
    processor: BlockRoutingAttnProcessor, logits: list[list[float]], layout: TokenLayout, block: int
) -> list[list[bool]]:
    blocks = cut(0, layout.length, block)
    text = range(*layout.text) if layout.text else range(0)
    first = range(layout.visual[0], layout.visual[0] + layout.frame_tokens) if processor.first_frame else range(0)

    def holds(part: range, tokens: range) -> bool:
        return any(token in tokens for token in part)

    always = {j for j, part in enumerate(blocks) if holds(part, text) or holds(part, first)}
    mask = []
    for rows in blocks:
        weights = [block_weight(processor.score, logits, rows, columns, block) for columns in blocks]
        kept = chosen(processor.select, processor.amount, weights, always)
        mask.append([holds(rows, text) or j in kept for j in range(len(blocks))])
    return mask


def logits_of(query: Tensor, key: Tensor, shared: bool) -> Tensor:
    """``[heads or 1, queries, keys]`` in double; heads that share a list have the mean of their scores."""
    logits = query.double() @ key.double().transpose(-1, -2) / math.sqrt(DIM)
    return logits.mean(0, keepdim=True) if shared else logits


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([3, 4, 5]), st.sampled_from([3, 5, 7])),
    text=st.tuples(st.sampled_from(["absent", "before", "after"]), st.integers(1, 7)),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    block=st.sampled_from([4, 8]),
    score=st.sampled_from(["pooled", "sub_block", "mass"]),
    rule=amounts,
    shared=st.booleans(),
    first_frame=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_masks_are_those_of_the_formula(
    grid: tuple[int, int, int],
    text: tuple[str, int],
    sizes: tuple[int, int],
    block: int,
    score: Any,
    rule: tuple[Any, Any],
    shared: bool,
    first_frame: bool,
    seed: int,
) -> None:
    place, count = text
    before = count if place == "before" else 0
    visual = (before, before + math.prod(grid))
    layout = TokenLayout(grid, visual, {"before": (0, count), "after": (visual[1], visual[1] + count)}.get(place))
    shared = shared and score != "mass"
    select, amount = rule
    processor = BlockRoutingAttnProcessor(
        score=score, select=select, amount=amount, head_shared=shared, first_frame=first_frame
    )
    processor.block = block  # kernels want 64 or 128, the formula does not
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(*sizes, layout.length, DIM, generator=generator) * 1.5 for _ in range(2))
    state = StepState(0, 9, 20, "cond", "transformer", 0, layout, None)
    setup = processor.at_step(processor.set_up(SITE, layout, query.device), SITE, state)
    found = processor.find_plan(query, key, setup, scale=None).to_bool()
    assert found.shape[:2] == (sizes[0], 1 if shared else sizes[1])
    for item, heads in enumerate(found):
        for head, logits in enumerate(logits_of(query[item], key[item], shared)):
            assert heads[head].tolist() == wanted(processor, logits.tolist(), layout, block)
