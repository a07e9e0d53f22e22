"""Attention among merged tokens, with agents that are merged further, as AgentSD has it for UNets.

Sources: Bolya and Hoffman, arXiv 2303.17604 (merging); Han et al., ECCV 2024, arXiv 2312.08874 (agents).

The originals merge the input x of an attention module, and agents are queries of tokens merged further.  Queries, keys
and values are linear in x (a bias is allowed), and a mean goes through what is linear, so merging them by the same
edges is the same.  Only what edges are chosen by differs: keys of all heads side by side, where the originals have x.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import SECOND_SCALE_POWER, SHORTCUT, agent_attention
from .merging import TokenPairs, pair_tokens


def merged_counts(tokens: int, cells: int, ratio: float, agent_ratio: float) -> tuple[int, int]:
    """How many tokens stay, and how many agents there are; 0 agents where going through them takes no fewer scores.

    Args:
        tokens: N.
        cells: Destinations.
        ratio: Share of the tokens that are merged into others.
        agent_ratio: Likewise for the agents.
    """
    kept, agents = (tokens - min(math.floor(tokens * share), tokens - cells) for share in (ratio, agent_ratio))
    return kept, agents if 2 * agents < kept else 0


def merged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    destinations: Tensor,
    *,
    ratio: float,
    agent_ratio: float,
    scale: float | None = None,
    second_scale_power: float = SECOND_SCALE_POWER,
    shortcut: float = SHORTCUT,
) -> Tensor:
    """Merges similar tokens, attends among what is left, and gives every token the output of what it is part of.

    With agents (see `merged_counts`) attention goes through them, with the shortcut; else it is dense.

    Args:
        q: `[B, H, N, D]`, any strides.
        k: `[B, H, N, D]`, from which pairs are chosen.
        v: `[B, H, N, D]`.
        destinations: int64 `[1 or B, cells]`, see `draw_destinations`.
        ratio: Share of the tokens that are merged into others, in [0, 1].
        agent_ratio: Likewise for the agents.
        scale: Of the first softmax, `D ** -0.5` by default.
        second_scale_power: See `agent_attention`.
        shortcut: See `agent_attention`.

    Returns:
        `[B, H, N, D]`, dtype of q.

    Raises:
        ValueError: A ratio outside [0, 1], or tensors that do not fit together.
    """
    pairs = pair_tokens(_rows(k), destinations)
    return attention_of_pairs(
        q,
        k,
        v,
        pairs,
        ratio=ratio,
        agent_ratio=agent_ratio,
        scale=scale,
        second_scale_power=second_scale_power,
        shortcut=shortcut,
    )


def attention_of_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: TokenPairs,
    *,
    ratio: float,
    agent_ratio: float,
    scale: float | None,
    second_scale_power: float,
    shortcut: float,
) -> Tensor:
    """As `merged_attention`, for pairs that are chosen already."""
    heads = q.shape[1]
    merge = pairs.merge_ratio(ratio)
    rows = merge.merge(torch.cat([_rows(x) for x in (q, k, v)], -1))
    short_q, short_k, short_v = (_heads(x, heads) for x in rows.chunk(3, -1))
    _, count = merged_counts(pairs.tokens, pairs.tokens - pairs.sources.shape[1], ratio, agent_ratio)
    if count:
        agents = _heads(pairs.merge_ratio(agent_ratio).merge(_rows(q)), heads)
        out = agent_attention(
            short_q,
            short_k,
            short_v,
            agents,
            scale=scale,
            second_scale_power=second_scale_power,
            shortcut=shortcut,
        )
    else:
        out = F.scaled_dot_product_attention(short_q, short_k, short_v, scale=scale)
    return _heads(merge.unmerge(_rows(out)), heads)


def _rows(x: Tensor) -> Tensor:
    """`[B, H, N, D]` to `[B, N, H * D]`; a view if tokens come before heads in memory, as models have it."""
    return x.transpose(1, 2).flatten(2)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
