"""Agent attention from the formulas, in loops over single tokens, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout


def seen_by(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> tuple[Tensor, float]:
    """What one query gets by softmax, and the log of the sum of its exponentials."""
    scores = [scale * float(query @ key) for key in keys]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    mean = sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0])) / sum(weights)
    return mean, top + math.log(sum(weights))


def through_agents(q: list[Tensor], k: list[Tensor], v: list[Tensor], agents: list[Tensor], scales: Any) -> Any:
    """For every query what it gets and its log-sum-exp: means of the agents' by the weights of the second softmax."""
    found = [seen_by(agent, k, v, scales[0]) for agent in agents]
    gathered, masses = [mean for mean, _ in found], [torch.tensor([lse]).double() for _, lse in found]
    return [(seen_by(x, agents, gathered, scales[1])[0], seen_by(x, agents, masses, scales[1])[0].item()) for x in q]


def tile_means(q: list[Tensor], grid: tuple[int, int, int], cells: tuple[int, int, int]) -> list[Tensor]:
    """Cell i of n along L tokens: from floor(i L / n) to ceil((i + 1) L / n)."""
    agents = []
    for place in itertools.product(*(range(n) for n in cells)):
        spans = [
            range(math.floor(i * length / n), math.ceil((i + 1) * length / n))
            for i, n, length in zip(place, cells, grid, strict=True)
        ]
        members = [q[(t * grid[1] + y) * grid[2] + x] for t, y, x in itertools.product(*spans)]
        agents.append(sum(members, torch.zeros_like(q[0])) / len(members))
    return agents


def pooled(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, cells: tuple[int, int, int], scales: Any, shortcut: float
) -> Tensor:
    """One head, ``[tokens, head_dim]``: tokens outside the grid are exact, as queries and as keys."""
    order = range(layout.length) if layout.order is None else layout.order.tolist()
    place = {token: position for position, token in enumerate(order)}
    rows = [[x[place[token]].double() for token in range(layout.length)] for x in (q, k, v)]
    start, stop = layout.visual
    beside = [token for token in range(layout.length) if not start <= token < stop]
    visual_q, visual_k, visual_v = (row[start:stop] for row in rows)
    agents = tile_means(visual_q, layout.grid, cells)
    out = torch.empty(q.shape, dtype=torch.float64)
    for token in beside:
        out[place[token]] = seen_by(rows[0][token], rows[1], rows[2], scales[0])[0]
    for i, (mean, lse) in enumerate(through_agents(visual_q, visual_k, visual_v, agents, scales)):
        if beside:
            exact, mass = seen_by(visual_q[i], [rows[1][t] for t in beside], [rows[2][t] for t in beside], scales[0])
            share = 1 / (1 + math.exp(mass - lse))
            mean = share * mean + (1 - share) * exact
        out[place[start + i]] = mean + shortcut * visual_v[i]
    return out


def groups_of(k: Tensor, destinations: set[int], ratio: float) -> list[list[int]]:
    """One batch item, ``[heads, tokens, head_dim]``: which tokens become one, by the cosine of keys of all heads."""
    flat = [k[:, token].double().flatten() for token in range(k.shape[1])]
    edges = []
    for source in sorted(set(range(len(flat))) - destinations):
        cosines = {t: float(flat[source] @ flat[t] / flat[source].norm() / flat[t].norm()) for t in destinations}
        best = max(sorted(cosines), key=cosines.__getitem__)
        edges.append((cosines[best], source, best))
    edges.sort(key=lambda edge: -edge[0])
    into = {source: best for _, source, best in edges[: math.floor(len(flat) * ratio)]}
    kept = [token for token in range(len(flat)) if token not in into]
    return [[token, *(source for source, best in into.items() if best == token)] for token in kept]


def merged(
    q: Tensor, k: Tensor, v: Tensor, destinations: set[int], ratios: tuple[float, float], scales: Any, shortcut: float
) -> Tensor:
    """One batch item, ``[heads, tokens, head_dim]``: merge, attend through agents or densely, unmerge."""
    groups, deeper = (groups_of(k, destinations, ratio) for ratio in ratios)
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(q.shape[0]):

        def means(x: Tensor, of: list[list[int]], head: int = head) -> list[Tensor]:
            return [sum(x[head, m].double() for m in members) / len(members) for members in of]  # type: ignore[misc]

        short_q, short_k, short_v = (means(x, groups) for x in (q, k, v))
        if 2 * len(deeper) < len(groups):
            agents = means(q, deeper)
            found = [mean for mean, _ in through_agents(short_q, short_k, short_v, agents, scales)]
            found = [mean + shortcut * value for mean, value in zip(found, short_v, strict=True)]
        else:
            found = [seen_by(x, short_k, short_v, scales[0])[0] for x in short_q]
        for members, mean in zip(groups, found, strict=True):
            out[head, members] = mean
    return out
