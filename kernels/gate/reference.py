"""The block gate and its teacher as their formulas say, number by number: the specification of the fast ones.

Source: SeerAttention, arXiv 2410.13276, and for scale and shift arXiv 1709.07871.
"""

from __future__ import annotations

import math

from torch import Tensor

from .gate import EMBEDDING, GateWeights

Row = list[float]


def reference_embedding(level: float) -> Row:
    """Cosines of the log-odds of a noise level, between those of 1 / 1024 and 1023 / 1024."""
    level = min(max(level, 1 / 1024), 1023 / 1024)
    place = (math.log(level / (1 - level)) + math.log(1023)) / (2 * math.log(1023))
    return [math.cos(math.pi * place * i) for i in range(EMBEDDING)]


def reference_logits(q: Tensor, k: Tensor, weights: GateWeights, level: float, head: int, block: int) -> list[Row]:
    """`[rows][columns]`: the logarithm of the gate of one head, up to a constant of each row.

    Args:
        q: `[S, D]`.
        k: `[S, D]`.
        weights: of the gate.
        level: noise level, 0 to 1.
        head: which one.
        block: tokens per block.
    """
    queries, keys = ([part.tolist() for part in x.double().split(block)] for x in (q, k))
    pooled_q = [[sum(column) / len(column) for column in zip(*part, strict=True)] for part in queries]
    pooled_k = []
    for part in keys:
        columns = list(zip(*part, strict=True))
        pooled_k.append([*map(max, columns), *map(min, columns), *(sum(column) / len(column) for column in columns)])
    query, key, step = (part[head].double().tolist() for part in weights)
    width = len(query[0])
    modulation = _times(reference_embedding(level), step)
    mapped_q = [[x * (1 + modulation[i]) + modulation[width + i] for i, x in enumerate(_times(row, query))]
                for row in pooled_q]  # fmt: skip
    mapped_k = [_times(row, key) for row in pooled_k]
    return [[sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(width) for y in mapped_k] for x in mapped_q]


def reference_blocks(
    logits: list[Row], text: set[int], *, count: int | None = None, threshold: float | None = None
) -> list[set[int]]:
    """The key blocks that each row keeps.

    Args:
        logits: of one head.
        text: blocks that hold text.
        count: blocks without text that a row keeps.
        threshold: instead: the least part of the row's softmax over blocks without text.
    """
    free = [j for j in range(len(logits)) if j not in text]
    rows = []
    for i, row in enumerate(logits):
        ranked = sorted(free, key=lambda j: -row[j])
        total = sum(math.exp(row[j] - row[ranked[0]]) for j in free)
        if i in text:
            kept = free
        elif count is not None:
            kept = ranked[:count]
        else:
            assert threshold is not None
            kept = [j for j in ranked if math.exp(row[j] - row[ranked[0]]) / total >= threshold] or ranked[:1]
        rows.append({*kept, *text})
    return rows


def reference_maps(q: Tensor, k: Tensor, block: int) -> tuple[list[Row], list[Row]]:
    """`[rows][columns]` of one head: the greatest softmax weight in each block, and the block's share of the row.

    Args:
        q: `[S, D]`.
        k: `[S', D]`.
        block: tokens per block.
    """
    rows = -(-q.shape[0] // block), -(-k.shape[0] // block)
    greatest = [[0.0] * rows[1] for _ in range(rows[0])]
    share = [[0.0] * rows[1] for _ in range(rows[0])]
    keys = k.double().tolist()
    for i, query in enumerate(q.double().tolist()):
        products = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
        scores = [math.exp(product / math.sqrt(len(query))) for product in products]
        total, row, queries = sum(scores), i // block, min(block, q.shape[0] - i // block * block)
        for j, score in enumerate(scores):
            weight = score / total
            greatest[row][j // block] = max(greatest[row][j // block], weight)
            share[row][j // block] += weight / queries
    return greatest, share


def _times(row: Row, matrix: list[Row]) -> Row:
    return [sum(x * column[j] for x, column in zip(row, matrix, strict=True)) for j in range(len(matrix[0]))]
