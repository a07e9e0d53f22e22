"""From block scores to kept blocks: top-k, top-p and threshold, as tensors on the device, without waiting for it.

All three rank the blocks of a row the same way: always-kept ones first, then by falling score, equal scores by rising
block id.  So results do not depend on the device or on the run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .running import running_sum


def select_topk(scores: Tensor, count: int | Tensor, *, always: Tensor | None = None, minimum: int = 1) -> Tensor:
    """Keeps the `count` best blocks of every row.

    Args:
        scores: `[..., rows, cols]`, any floating dtype, no NaN.
        count: Blocks per row, always-kept ones included; more than `cols` means all.  A tensor that broadcasts to
            `[..., rows]` gives heads (`[H, 1]`) or rows their own count.
        always: bool, broadcasts to `scores`: blocks kept in any case, even beyond `count`.
        minimum: Blocks that a row keeps at least.

    Returns:
        bool, shape of `scores`.

    Raises:
        ValueError: Wrong shapes or dtypes, or a count or minimum below 0.
    """
    _check(scores, always, minimum)
    if not isinstance(count, Tensor) and count < 0:
        raise ValueError(f"count must not be negative, got {count}.")
    return _keep_best(_ranking(scores, always), _at_least(scores, always, minimum).clamp(min=count))


def select_topp(mass: Tensor, share: float | Tensor, *, always: Tensor | None = None, minimum: int = 1) -> Tensor:
    """Keeps the fewest best blocks of every row that hold `share` of its mass.

    Args:
        mass: `[..., rows, cols]`, not negative, no NaN; rows need not sum to 1.
        share: Part of the row's mass to keep, 0 to 1.  A tensor that broadcasts to `[..., rows]` sets it per head or
            row.
        always: bool, broadcasts to `mass`: blocks kept in any case; their mass counts.
        minimum: Blocks that a row keeps at least, however little is asked for.

    Returns:
        bool, shape of `mass`.

    Raises:
        ValueError: Wrong shapes or dtypes, a share outside 0 to 1, or a negative minimum.
    """
    _check(mass, always, minimum)
    if not isinstance(share, Tensor) and not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}.")
    order = _ranking(mass, always)
    # Double precision, so that sums over thousands of blocks do not decide who is kept.
    held = running_sum(mass.double().gather(-1, order))
    target = (held[..., -1] * share)[..., None]
    before = torch.cat((torch.zeros_like(held[..., :1]), held[..., :-1]), -1)
    needed = (before < target).sum(-1)
    return _keep_best(order, torch.maximum(needed, _at_least(mass, always, minimum)))


def select_threshold(
    scores: Tensor, threshold: float | Tensor, *, always: Tensor | None = None, minimum: int = 1
) -> Tensor:
    """Keeps the blocks whose score is at least `threshold`.

    Args:
        scores: `[..., rows, cols]`, any floating dtype, no NaN.
        threshold: Lowest score to keep, in the unit of `scores`.  A tensor that broadcasts to `[..., rows]` sets it
            per head or row.
        always: bool, broadcasts to `scores`: blocks kept in any case.
        minimum: Blocks that a row keeps at least, the best ones, whatever their score.

    Returns:
        bool, shape of `scores`.

    Raises:
        ValueError: Wrong shapes or dtypes, or a negative minimum.
    """
    _check(scores, always, minimum)
    kept = scores >= (threshold[..., None] if isinstance(threshold, Tensor) else threshold)
    if always is not None:
        kept = kept | always
    if minimum == 0:
        return kept
    return kept | _keep_best(_ranking(scores, always), _at_least(scores, None, minimum))


def row_lists(keep: Tensor, *, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """Turns kept blocks into padded rows of block ids, as `SparsePlan` holds them.

    Args:
        keep: bool `[..., rows, cols]`.
        capacity: Width of the lists; `cols` by default, which always fits.  A row that keeps more loses its last ids.

    Returns:
        `(indices, counts)`: int32 `[..., rows, capacity]`, ascending ids followed by zeros, and int32 `[..., rows]`.

    Raises:
        ValueError: Wrong dtype or rank, or a capacity below 1.
    """
    if keep.dtype != torch.bool or keep.ndim < 2:
        raise ValueError(f"keep must be bool [..., rows, cols], got {keep.dtype} of shape {tuple(keep.shape)}.")
    width = keep.shape[-1] if capacity is None else capacity
    if width < 1:
        raise ValueError(f"capacity must be at least 1, got {width}.")
    # Each kept id goes to its place; all others go to a spare place, which is cut off again.
    place = torch.where(keep, keep.cumsum(-1) - 1, width).clamp(max=width)
    ids = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device).expand(keep.shape)
    lists = torch.zeros(*keep.shape[:-1], width + 1, dtype=torch.int32, device=keep.device)
    return lists.scatter_(-1, place, ids)[..., :width].contiguous(), keep.sum(-1, dtype=torch.int32).clamp(max=width)


def _ranking(scores: Tensor, always: Tensor | None) -> Tensor:
    key = scores if always is None else scores.masked_fill(always, float("inf"))
    return torch.argsort(key, dim=-1, descending=True, stable=True)


def _at_least(scores: Tensor, always: Tensor | None, minimum: int) -> Tensor:
    """int64 `[..., rows]`: how many of the best blocks each row keeps in any case."""
    if always is None:
        return torch.full(scores.shape[:-1], minimum, dtype=torch.int64, device=scores.device)
    return always.sum(-1).clamp(min=minimum).expand(scores.shape[:-1])


def _keep_best(order: Tensor, counts: Tensor) -> Tensor:
    first = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, first)


def _check(scores: Tensor, always: Tensor | None, minimum: int) -> None:
    if not scores.is_floating_point() or scores.ndim < 2 or 0 in scores.shape:
        raise ValueError(f"Scores must be floating [..., rows, cols], got {scores.dtype} of {tuple(scores.shape)}.")
    if minimum < 0:
        raise ValueError(f"minimum must not be negative, got {minimum}.")
    if always is None:
        return
    fits = always.ndim <= scores.ndim and always.shape[-2:] == scores.shape[-2:]
    fits = fits and all(a in (1, s) for a, s in zip(always.shape[::-1], scores.shape[::-1], strict=False))
    if always.dtype != torch.bool or not fits:
        raise ValueError(
            f"always must be bool and broadcast over batch and heads to {tuple(scores.shape)}, "
            f"got {always.dtype} of shape {tuple(always.shape)}."
        )
