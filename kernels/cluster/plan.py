"""`cluster_plan`: tokens sorted by clusters, and which clusters of keys each cluster of queries looks at, as a plan.

Source: Sparse VideoGen 2 (arXiv 2505.18875).  Query cluster i gives key cluster j the mass
`P[i, j] ~ |K_j| exp(scale * cq_i . ck_j)`, summed to 1 over j, where cq and ck are centroids and |K_j| counts keys.

Clusters have any size and blocks of a plan one, so a block may hold parts of several clusters.  "keep" lists every
block that a chosen pair of clusters touches, "exact" cuts blocks by a `Bitmap` down to the chosen pairs.  Clusters are
sorted along a chain, so that those which share a block are alike.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bitmap import WORD_BITS, Bitmap
from ..precision import in_full_precision
from ..search.cells import packed_words
from ..search.inputs import check_search, softmax_scale
from ..search.select import row_lists, select_topk, select_topp
from ..sparse_plan import PlanStats, SparsePlan
from .kmeans import Clusters, chained, kmeans

Centroids = tuple[Tensor, Tensor]

# What the bitmaps of "exact" may take, in bytes: a bit for every pair of tokens of every head, in words of 32.
EXACT_BYTES = 1 << 30

# What the lists of one call may take; every site of a model keeps its own for each branch.
LIST_BYTES = 1 << 30

# Scores of blocks in float32 that are held at a time; what ranks and lists them takes about ten times as much.
_SCORE_BYTES = 256 << 20


class ClusterRule(NamedTuple):
    """How tokens are clustered and clusters are chosen.

    Attributes:
        text: Range of tokens that see everything and are seen by all, and take part in no cluster.
        q_clusters: Clusters of queries, at most the tokens beside text.
        k_clusters: Clusters of keys, likewise.
        iterations: Rounds of k-means.
        block: Tokens per block of queries and of keys.
        top_p: Part of the mass that the chosen clusters hold at least, unless there are `counts`.
        minimum: Clusters that are chosen at least, unless there are `counts`.
        width: Length of the lists, at least the blocks that any row keeps.
        exact: Whether blocks are cut down to the chosen clusters.
    """

    text: tuple[int, int]
    q_clusters: int
    k_clusters: int
    iterations: int
    block: int
    top_p: float
    minimum: int
    width: int
    exact: bool


def cluster_plan(
    q: Tensor,
    k: Tensor,
    rule: ClusterRule,
    *,
    counts: Tensor | None = None,
    start: Centroids | None = None,
    scale: float | None = None,
) -> tuple[SparsePlan, Centroids]:
    """Builds a plan from the queries and keys of one attention call, without waiting for the device.

    With `counts` the plan has that many blocks of keys in each row: those with the greatest mass, where the mass of a
    block is that of its parts of clusters, `P[i, j] / |K_j|` for every query of i and key of j.  If it is exact,
    counts are keys: query clusters choose the clusters with the greatest mass per key until they hold that many.
    Traceable: while it is being compiled, the search is one operator.

    Args:
        q: `[B, H, N, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, H, N, D]`, dtype and device of q.
        rule: How to cluster and to choose.
        counts: int64 `[H or 1, 1]`, text included.  None: by `top_p`.
        start: Centroids of queries and of keys to start from, as an earlier call returned them.
        scale: Factor on the scores, `D ** -0.5` by default.

    Returns:
        The plan, with an order for each head's queries and another for its keys, and its density NaN until it is
        counted; and the centroids of queries and keys, float32 `[B, H, clusters, D]`.

    Raises:
        ValueError: q, k and the rule do not fit together, or lists or bitmaps would take too much memory.
    """
    _check(q, k, rule)
    find: Any = cluster_lists if torch.compiler.is_compiling() else _find
    start_q, start_k = (None, None) if start is None else start
    scale = softmax_scale(scale, q.shape[-1])
    found = find(q.detach(), k.detach(), start_q, start_k, counts, *rule.text, *rule[1:], scale)
    indices, listed, full, order, kv_order, centers_q, centers_k, slots, words = found
    plan = SparsePlan(
        q_len=q.shape[2],
        kv_len=k.shape[2],
        block_q=rule.block,
        block_kv=rule.block,
        indices=indices,
        counts=listed,
        full_counts=full if rule.exact else listed,
        stats=PlanStats(math.nan, (), "cluster", rule._asdict()),
        pair_test=Bitmap(slots, words, rule.block) if rule.exact else None,
        order=order,
        kv_order=kv_order,
    )
    return plan, (centers_q, centers_k)


def cluster_mass(q: Clusters, k: Clusters, scale: float) -> tuple[Tensor, Tensor]:
    """How much of the softmax of a query cluster falls on a key cluster, estimated by their centroids.

    Returns:
        float32 `[B, H, Cq, Ck]`: scores of centroids, -inf where a key cluster is empty; and the mass, P.
    """
    scores = q.centroids @ k.centroids.transpose(-1, -2) * scale
    scores = scores.masked_fill(k.sizes[..., None, :] == 0, float("-inf"))
    return scores, (scores + k.sizes[..., None, :].clamp(min=1).float().log()).softmax(-1)


def choose_by_keys(scores: Tensor, sizes: Tensor, keys: Tensor) -> Tensor:
    """Chooses the clusters with the best scores until they hold `keys` keys, and at least one.

    Args:
        scores: `[B, H, Cq, Ck]`.
        sizes: int64 `[B, H, Ck]`, keys of each cluster.
        keys: int64 `[H or 1, 1]`.

    Returns:
        bool `[B, H, Cq, Ck]`.
    """
    ranking = scores.argsort(dim=-1, descending=True, stable=True)
    size = sizes[..., None, :].expand_as(ranking).gather(-1, ranking)
    before = size.cumsum(-1) - size
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ranking, before < keys[..., None].clamp(min=1))


class _Sorted(NamedTuple):
    """Tokens of each head by label, with text as a last cluster of its own.

    Attributes:
        order: int64 `[B, H, N]`, the token at each position.
        labels: int64 `[B, H, N]`, the label at each position.
        parts: float32 `[B, H, blocks, C + 1]`, tokens of each cluster in each block.
    """

    order: Tensor
    labels: Tensor
    parts: Tensor


@in_full_precision
def _find(
    q: Tensor, k: Tensor, start_q: Tensor | None, start_k: Tensor | None, counts: Tensor | None, *rule: Any
) -> tuple[Tensor, ...]:
    """The lists of the plan, its orders, the centroids, and slots and words of its bitmap; some heads at a time."""
    block, exact = rule[5], rule[9]
    step = max(1, _SCORE_BYTES // (q.shape[0] * (-(-q.shape[2] // block)) ** 2 * 4))
    if exact or step >= q.shape[1]:  # bitmaps are refused where they are large
        return _of_heads(q, k, start_q, start_k, counts, *rule)
    found = []
    for head in range(0, q.shape[1], step):
        part = slice(head, head + step)
        of_q, of_k = (None if start is None else start[:, part] for start in (start_q, start_k))
        of_heads = counts if counts is None or counts.shape[0] == 1 else counts[part]
        found.append(_of_heads(q[:, part], k[:, part], of_q, of_k, of_heads, *rule)[:-2])
    return *(torch.cat(parts, 1) for parts in zip(*found, strict=True)), *_no_bitmap(q)


def _of_heads(
    q: Tensor,
    k: Tensor,
    start_q: Tensor | None,
    start_k: Tensor | None,
    counts: Tensor | None,
    text_start: int,
    text_stop: int,
    q_clusters: int,
    k_clusters: int,
    iterations: int,
    block: int,
    top_p: float,
    minimum: int,
    width: int,
    exact: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """As `_find`, for heads whose scores fit into memory together."""
    text = (text_start, text_stop)
    of_q = _clustered(_without(q, text), q_clusters, start_q, iterations)
    of_k = _clustered(_without(k, text), k_clusters, start_k, iterations)
    rows, columns = _sorted(of_q, text, block), _sorted(of_k, text, block)
    scores, mass = cluster_mass(of_q, of_k, scale)
    ends = (rows.order, columns.order, of_q.centroids, of_k.centroids)
    if counts is not None and not exact:
        best = _best_blocks(mass, of_k.sizes, rows.parts, columns.parts, counts)
        indices, listed = row_lists(best, capacity=width)
        return indices, listed, listed.clone(), *ends, *_no_bitmap(q)
    if counts is None:
        chosen = select_topp(mass, top_p, minimum=minimum)
    else:
        chosen = choose_by_keys(scores, of_k.sizes, counts - (text_stop - text_start))
    chosen = torch.nn.functional.pad(chosen, (0, 1, 0, 1), value=True)
    some = _touched(rows.parts, chosen, columns.parts)
    if not exact:
        indices, listed = row_lists(some, capacity=width)
        return indices, listed, listed.clone(), *ends, *_no_bitmap(q)
    whole = some & ~_touched(rows.parts, ~chosen, columns.parts)
    indices, full = _full_ones_first(some, whole)
    return indices, some.sum(-1, dtype=torch.int32), full, *ends, *_bitmap(rows, columns, chosen, block)


def _clustered(x: Tensor, clusters: int, start: Tensor | None, iterations: int) -> Clusters:
    """Clusters in a chain; those that start from earlier ones have been put into it then."""
    return chained(kmeans(x, clusters, iterations)) if start is None else kmeans(x, start, iterations)


def _without(x: Tensor, text: tuple[int, int]) -> Tensor:
    return torch.cat((x[:, :, : text[0]], x[:, :, text[1] :]), 2) if text[0] < text[1] else x


def _sorted(clusters: Clusters, text: tuple[int, int], block: int) -> _Sorted:
    count = clusters.centroids.shape[2]
    labels = clusters.labels
    if text[0] < text[1]:
        of_text = labels.new_full((*labels.shape[:2], text[1] - text[0]), count)
        labels = torch.cat((labels[..., : text[0]], of_text, labels[..., text[0] :]), -1)
    labels, order = labels.sort(dim=-1, stable=True)
    blocks = -(-labels.shape[-1] // block)
    place = torch.arange(labels.shape[-1], device=labels.device) // block * (count + 1) + labels
    parts = torch.zeros(*labels.shape[:2], blocks * (count + 1), dtype=torch.float32, device=labels.device)
    # Sums of ones are exact in any order.
    parts.scatter_add_(-1, place, torch.ones_like(place, dtype=torch.float32))
    return _Sorted(order, labels, parts.unflatten(-1, (blocks, count + 1)))


def _best_blocks(mass: Tensor, sizes: Tensor, rows: Tensor, columns: Tensor, counts: Tensor) -> Tensor:
    """The blocks of greatest mass in each row, those with text first: bool `[B, H, NQ, NK]`."""
    per_key = mass / sizes.clamp(min=1)[..., None, :]
    of_blocks = rows[..., :-1] @ per_key @ columns[..., :-1].transpose(-1, -2)
    text = (rows[..., -1:] > 0) | (columns[..., None, :, -1] > 0)
    return select_topk(of_blocks, counts, always=text)


def _touched(rows: Tensor, pairs: Tensor, columns: Tensor) -> Tensor:
    """Which blocks hold one of the marked pairs of clusters: bool `[B, H, NQ, NK]`."""
    return ((rows > 0).float() @ pairs.float() @ (columns > 0).float().transpose(-1, -2)) > 0.5


def _full_ones_first(some: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    rank = 2 - some.to(torch.uint8) - whole.to(torch.uint8)
    ids = torch.argsort(rank, dim=-1, stable=True).to(torch.int32)
    slots = torch.arange(ids.shape[-1], device=ids.device)
    return torch.where(slots < some.sum(-1, keepdim=True), ids, 0), whole.sum(-1, dtype=torch.int32)


def _bitmap(rows: _Sorted, columns: _Sorted, chosen: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """An entry for every block: queries of one cluster share their row of it."""
    batch, heads, tokens = rows.labels.shape
    padded = -tokens % block
    of_keys = columns.labels[..., None, :].expand(-1, -1, chosen.shape[2], -1)
    kept = torch.nn.functional.pad(chosen.gather(-1, of_keys), (0, padded)).unflatten(-1, (-1, block))
    words = packed_words(kept)  # [B, H, Cq + 1, NK, words of a block]
    label = torch.nn.functional.pad(rows.labels, (0, padded))
    of_queries = label[..., None, None].expand(-1, -1, -1, *words.shape[3:])
    entries = words.gather(2, of_queries).unflatten(2, (-1, block)).transpose(3, 4)
    slots = torch.arange(batch * heads * entries.shape[2] * entries.shape[3], dtype=torch.int32, device=label.device)
    return slots.view(entries.shape[:4]), entries.flatten(0, 3).contiguous()


def _no_bitmap(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(0, dtype=torch.int32), q.new_empty(0, dtype=torch.int32)


def _check(q: Tensor, k: Tensor, rule: ClusterRule) -> None:
    check_search(q.transpose(1, 2), k.transpose(1, 2), rule.block, rule.block)
    tokens = q.shape[2]
    if k.shape[2] != tokens:
        raise ValueError(f"q has {tokens} tokens, k has {k.shape[2]}; text could not be told from the rest.")
    if not 0 <= rule.text[0] <= rule.text[1] <= tokens:
        raise ValueError(f"text is {rule.text}, which is not a range within [0, {tokens}].")
    heads = q.shape[0] * q.shape[1]
    blocks = -(-tokens // rule.block)
    size = heads * blocks**2 * rule.block * -(-rule.block // WORD_BITS) * 4
    if rule.exact and size > EXACT_BYTES:
        raise ValueError(
            f"Exact clusters of {tokens} tokens and {heads} heads take bitmaps of {size >> 20} MiB, more than "
            f"{EXACT_BYTES >> 20}. Keep whole blocks instead, boundaries='keep'."
        )
    size = heads * blocks * rule.width * 4
    if size > LIST_BYTES:
        way_out = f"larger blocks, block={2 * rule.block}" if rule.block < 128 else "fewer or shorter videos at a time"
        raise ValueError(
            f"Lists of blocks of {rule.block} of {tokens} tokens and {heads} heads take {size >> 20} MiB, more than "
            f"{LIST_BYTES >> 20}. Take {way_out}."
        )


# Spelled out, since older torch releases do not read postponed annotations.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor? start_q, Tensor? start_k, Tensor? counts, int text_start, int text_stop, "
    "int q_clusters, int k_clusters, int iterations, int block, float top_p, int minimum, int width, bool exact, "
    "float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

cluster_lists = torch.library.custom_op("dit_accel::cluster_lists", _find, mutates_args=(), schema=_SCHEMA)
"""The search as one operator, so that compiled code finds the very clusters that eager code does."""


@cluster_lists.register_fake
def _(
    q: Tensor,
    k: Tensor,
    start_q: Tensor | None,
    start_k: Tensor | None,
    counts: Tensor | None,
    text_start: int,
    text_stop: int,
    q_clusters: int,
    k_clusters: int,
    iterations: int,
    block: int,
    top_p: float,
    minimum: int,
    width: int,
    exact: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    batch, heads, tokens, dim = q.shape
    blocks = -(-tokens // block)
    words = -(-block // WORD_BITS)

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return q.new_empty(shape, dtype=dtype)

    lead = (batch, heads, blocks)
    orders = (ints(batch, heads, tokens, dtype=torch.int64) for _ in range(2))
    centers = (q.new_empty(batch, heads, n, dim, dtype=torch.float32) for n in (q_clusters, k_clusters))
    bitmap = (
        (ints(*lead, blocks), ints(batch * heads * blocks * blocks, block, words)) if exact else (ints(0), ints(0))
    )
    return ints(*lead, blocks if exact else width), ints(*lead), ints(*lead), *orders, *centers, *bitmap
