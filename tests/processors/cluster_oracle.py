"""Cluster attention by the formulas of Sparse VideoGen 2, in loops, for one head."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.kmeans_oracle import chain_of, lloyd, start_of


class Side(NamedTuple):
    """Tokens of one head, clustered.

    Attributes:
        label: cluster of each token; -1 for text.
        centers: centroids.
        sequence: tokens by cluster, text last.
    """

    label: list[int]
    centers: Tensor
    sequence: list[int]


def side(x: Tensor, text: range, clusters: int, iterations: int, start: Tensor | None = None) -> Side:
    """Clusters `[N, D]`; the first clusters of all are numbered along a chain."""
    visual = [n for n in range(len(x)) if n not in text]
    labels, centers = lloyd(x[visual], start_of(x[visual], clusters) if start is None else start, iterations)
    if start is None:
        chain = chain_of(centers)
        labels, centers = [chain.index(label) for label in labels], centers[chain]
    label = [-1] * len(x)
    for n, found in zip(visual, labels, strict=True):
        label[n] = found
    sequence = sorted(visual, key=lambda n: (label[n], n)) + list(text)
    return Side(label, centers, sequence)


def weights(q: Side, k: Side, scale: float) -> list[list[float]]:
    """How much one key of cluster j weighs for cluster i; the keys of a row weigh 1 together."""
    table = []
    for center in q.centers:
        exps = [math.exp(scale * float(center @ other)) for other in k.centers]
        total = sum(k.label.count(j) * e for j, e in enumerate(exps))
        table.append([e / total for e in exps])
    return table


def by_mass(weight: list[list[float]], sizes: list[int], top_p: float, at_least: int) -> list[set[int]]:
    """The fewest clusters of greatest mass that hold `top_p` of it, and at least so many."""
    chosen = []
    for row in weight:
        mass = [w * size for w, size in zip(row, sizes, strict=True)]
        ranked = sorted(range(len(mass)), key=lambda j: -mass[j])
        count = next(n for n in range(1, len(mass) + 1) if sum(mass[j] for j in ranked[:n]) >= top_p - 1e-9)
        chosen.append(set(ranked[: max(count, at_least)]))
    return chosen


def by_keys(weight: list[list[float]], sizes: list[int], keys: int) -> list[set[int]]:
    """The clusters whose keys weigh most, until they hold so many keys."""
    chosen = []
    for row in weight:
        ranked = sorted((j for j in range(len(row)) if sizes[j]), key=lambda j: -row[j])
        count = next((n for n in range(1, len(ranked) + 1) if sum(sizes[j] for j in ranked[:n]) >= keys), len(ranked))
        chosen.append(set(ranked[:count]))
    return chosen


def pairs(q: Side, k: Side, chosen: list[set[int]]) -> Tensor:
    """Which query sees which key: bool `[N, N]`."""
    rows = [[i < 0 or j < 0 or j in chosen[i] for j in k.label] for i in q.label]
    return torch.tensor(rows)


def snapped(q: Side, k: Side, mask: Tensor, block: int) -> Tensor:
    """All pairs of the blocks that hold a kept pair, where blocks are runs of the sorted tokens."""
    wide = torch.zeros_like(mask)
    for row in runs(q.sequence, block):
        for column in runs(k.sequence, block):
            some = any(bool(mask[n, m]) for n in row for m in column)
            for n in row:
                wide[n, column] = some
    return wide


def runs(sequence: list[int], block: int) -> list[list[int]]:
    """Its blocks."""
    return [sequence[i : i + block] for i in range(0, len(sequence), block)]


def block_mass(q: Side, k: Side, weight: list[list[float]], block: int) -> list[list[float]]:
    """Mass of each block, infinite where it holds text."""

    def mass(n: int, m: int) -> float:
        return math.inf if q.label[n] < 0 or k.label[m] < 0 else weight[q.label[n]][k.label[m]]

    return [
        [sum(mass(n, m) for n in row for m in column) for column in runs(k.sequence, block)]
        for row in runs(q.sequence, block)
    ]
