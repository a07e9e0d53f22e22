"""`dynamic_plan`: looks at q and k and says which blocks to keep, without waiting for the device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..bitmap import Bitmap
from ..pair_tests import block_area
from ..sparse_plan import PlanStats, SparsePlan, plan_from_blocks
from ..support import Support
from .always import Ranges, always_blocks
from .gaussian import Variance, select_gaussian
from .inputs import check_search, search_backend, tokens_per_block
from .mass import block_mass
from .ops import compiled_lists
from .pooled import pooled_scores, sub_block_scores
from .select import row_lists, select_threshold, select_topk, select_topp

Score = Literal["mass", "pooled", "lse"]
Keep = Literal["topk", "topp", "threshold", "gaussian"]


def dynamic_plan(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_kv: int,
    score: Score = "pooled",
    keep: Keep = "topk",
    amount: float | Tensor,
    always: Tensor | None = None,
    always_q: Ranges = (),
    always_kv: Ranges = (),
    minimum: int = 1,
    stride: int | None = None,
    variance: Variance | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
) -> SparsePlan:
    """Builds a plan from the queries and keys of one attention call.

    Nothing is read back from the device, so the density is unknown: `plan.density` is NaN until `count_density`, and
    lists are as wide as they could get.

    Args:
        q: `[B, q_len, H, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, kv_len, H, D]`, dtype and device of q.
        block_q: Queries per block; the last block may be short.
        block_kv: Keys per block, likewise.
        score: What a block is judged by: "mass", its exact softmax mass (`block_mass`, at least half the cost of dense
            attention); "pooled", its mean query and key (`pooled_scores`); "lse", means of its sub-blocks
            (`sub_block_scores`).  Each estimates the share of the row's mass that the block holds.
        keep: "topk", "topp" or "threshold", which `select.py` defines, or "gaussian", Sol-Attn's rule
            (`select_gaussian`), which scores by means itself.
        amount: For "topk" blocks per row (int) or the part of all blocks (float, 0 to 1, rounded up); for "topp" the
            part of a row's mass to keep; for "threshold" the lowest share of the row's mass, 0 to 1; for "gaussian"
            tau, standard deviations above the row's mean score (1, 1.5 and 2 keep about 16, 7 and 2.3 % of Gaussian
            scores).  A tensor that broadcasts to `[B, H, rows]` sets it per head or row; for "topk" an integer one.
        always: bool, broadcasts to `[B, H, rows, cols]`: blocks to keep in any case.
        always_q: Query ranges `(start, stop)` that see everything, such as text.
        always_kv: Key ranges that everyone sees.
        minimum: Blocks that a row keeps at least.
        stride: Tokens per sub-block for "lse"; a quarter of a block by default where that is whole.
        variance: How "gaussian" estimates the spread of a row's scores, "diag" (the default) or "exact".
        scale: Positive factor on the scores; `D ** -0.5` by default.
        lse: Cached log-sum-exp `[B, H, q_len]` for "mass".
        backend: "auto", "torch" or "triton"; `plan.stats.details` says which one ran and why.

    Returns:
        The plan, with lists per batch item and head, on the device of q.

    Raises:
        ValueError: Arguments do not fit together, or the named backend cannot run the call.
    """
    check_search(q, k, block_q, block_kv)
    _check_choices(score, keep, stride, variance, lse)
    if score == "lse" and stride is None:
        stride = default_stride(block_q, block_kv)
    if keep == "gaussian":
        variance = variance or "diag"
    ranges = (always, always_q, always_kv)
    rest: Any = (minimum, stride, variance, scale, lse, backend)
    if torch.compiler.is_compiling():
        forced = any(r is not None and len(r) for r in ranges)
        width = _width(-(-k.shape[1] // block_kv), keep, amount, minimum, forced)
        indices, counts = compiled_lists(q, k, block_q, block_kv, score, keep, amount, *ranges, *rest, width)
        support = Support(backend, True, "compiled; settled when it runs")
    else:
        indices, counts, support = _find(q, k, block_q, block_kv, score, keep, amount, *ranges, *rest)
    given = f"tensor {tuple(amount.shape)}" if isinstance(amount, Tensor) else amount
    details = {"score": score, "keep": keep, "amount": given, "minimum": minimum, "stride": stride}
    details |= {"variance": variance, "backend": support.backend, "reason": support.reason}
    return SparsePlan(
        q_len=q.shape[1],
        kv_len=k.shape[1],
        block_q=block_q,
        block_kv=block_kv,
        indices=indices,
        counts=counts,
        full_counts=counts,
        stats=PlanStats(math.nan, (), "dynamic", details),
        always_q=tuple((int(a), int(b)) for a, b in always_q),
        always_kv=tuple((int(a), int(b)) for a, b in always_kv),
    )


def _find(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_kv: int,
    score: Score,
    keep: Keep,
    amount: float | Tensor,
    always: Tensor | None,
    always_q: Ranges,
    always_kv: Ranges,
    minimum: int,
    stride: int | None,
    variance: Variance | None,
    scale: float | None,
    lse: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Support]:
    """Scores, selects and lists; returns indices and counts of the plan, and who took the scores."""
    # Only the mass kernel walks blocks in tiles; means do not care how long a block is.
    tiles = {"block_q": block_q, "block_kv": block_kv} if score == "mass" else {}
    support = search_backend(backend, q, k, **tiles)
    forced = _always(q, k, block_q, block_kv, always, always_q, always_kv)
    if keep == "gaussian":
        kept = select_gaussian(
            q,
            k,
            amount,
            block_q=block_q,
            block_kv=block_kv,
            variance=variance or "diag",
            scale=scale,
            always=forced,
            minimum=minimum,
            backend=support.backend,
        )
    else:
        scores = _scores(q, k, block_q, block_kv, score, stride, scale, lse, support.backend)
        kept = _select(scores, score, keep, amount, forced, minimum)
    width = _width(kept.shape[-1], keep, amount, minimum, forced is not None)
    return *row_lists(kept, capacity=width), support


def count_density(plan: SparsePlan) -> SparsePlan:
    """Fills in the exact density of a plan, which `dynamic_plan` leaves open.  Waits for the device; for reports.

    Args:
        plan: Any plan.

    Returns:
        The same plan with `stats.density` and `stats.density_per_head` counted.
    """
    blocks = plan.to_bool()
    counted = plan_from_blocks(
        blocks,
        q_len=plan.q_len,
        kv_len=plan.kv_len,
        block_q=plan.block_q,
        block_kv=plan.block_kv,
        partial=None if plan.pair_test is None else blocks & ~plan.to_bool(full_only=True),
        pair_test=plan.pair_test,
    ).stats
    stats = replace(plan.stats, density=counted.density, density_per_head=counted.density_per_head)
    return replace(plan, stats=stats)


def device_density(plan: SparsePlan) -> Tensor:
    """Counts the density of a plan without waiting for the device; only pair tests other than `Bitmap` make it wait.

    Args:
        plan: Any plan.

    Returns:
        Kept pairs over all pairs, a float32 scalar on the device of the plan.
    """
    if isinstance(plan.pair_test, Bitmap):
        return _bitmap_density(plan, plan.pair_test)
    if plan.pair_test is not None:
        return torch.tensor(count_density(plan).density, dtype=torch.float32, device=plan.device)
    slots = torch.arange(plan.indices.shape[-1], device=plan.device)
    ends_row = (plan.indices == plan.num_kv_blocks - 1) & (slots < plan.counts[..., None])
    missing = plan.num_kv_blocks * plan.block_kv - plan.kv_len  # of the last block of keys
    keys = plan.counts.long() * plan.block_kv - ends_row.any(-1) * missing
    queries = (plan.q_len - torch.arange(plan.num_q_blocks, device=plan.device) * plan.block_q).clamp(max=plan.block_q)
    lists = plan.counts.shape[0] * plan.counts.shape[1]
    return (keys * queries).sum().float() / (lists * plan.q_len * plan.kv_len)


def _bitmap_density(plan: SparsePlan, bits: Bitmap) -> Tensor:
    sizes = (plan.q_len, plan.kv_len, plan.block_q, plan.block_kv)
    pairs = torch.where(plan.to_bool(), bits.pairs_per_block(*sizes), 0)
    kept = torch.where(plan.to_bool(full_only=True), block_area(*sizes, plan.device), pairs)
    return kept.double().mean((0, 1)).sum().float() / (plan.q_len * plan.kv_len)


def default_stride(block_q: int, block_kv: int) -> int:
    """Tokens per sub-block: a quarter of the greatest length that divides both blocks, where that is whole."""
    common = math.gcd(block_q, block_kv)
    return common // 4 if common % 4 == 0 else common


def _scores(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_kv: int,
    score: Score,
    stride: int | None,
    scale: float | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    """Mass of each block for "mass", else an estimate of the log of its sum of exponentials, up to a constant."""
    if score == "mass":
        return block_mass(q, k, block_q=block_q, block_kv=block_kv, scale=scale, lse=lse, backend=backend)
    if stride is not None:
        return sub_block_scores(q, k, block_q=block_q, block_kv=block_kv, stride=stride, scale=scale, backend=backend)
    scores = pooled_scores(q, k, block_q=block_q, block_kv=block_kv, scale=scale, backend=backend)
    # The mean score of a block weighs as much as it has keys; only the short last block differs.
    return scores + tokens_per_block(k.shape[1], block_kv, scores.shape[-1], k.device).log()


def _always(
    q: Tensor, k: Tensor, block_q: int, block_kv: int, always: Tensor | None, always_q: Ranges, always_kv: Ranges
) -> Tensor | None:
    if not always_q and not always_kv:
        return always
    ranges = always_blocks(
        q.shape[1], k.shape[1], block_q, block_kv, always_q=always_q, always_kv=always_kv, device=q.device
    )
    return ranges if always is None else always | ranges


def _select(
    scores: Tensor, score: Score, keep: Keep, amount: float | Tensor, always: Tensor | None, minimum: int
) -> Tensor:
    """Applies the rule."""
    cols = scores.shape[-1]
    if keep == "topk":
        return select_topk(scores, _block_count(amount, cols), always=always, minimum=minimum)
    # Ranks need no exponential, in which small scores would become equal; shares do.
    shares = scores / scores.sum(-1, keepdim=True).clamp(min=1e-30) if score == "mass" else scores.softmax(-1)
    select = select_topp if keep == "topp" else select_threshold
    return select(shares, amount, always=always, minimum=minimum)


def _width(cols: int, keep: Keep, amount: float | Tensor, minimum: int, has_always: bool) -> int:
    """The greatest number of blocks that a row can keep, as far as shapes tell."""
    if keep != "topk" or has_always or isinstance(amount, Tensor):
        return cols
    return min(cols, max(1, minimum, int(_block_count(amount, cols))))


def _block_count(amount: float | Tensor, cols: int) -> int | Tensor:
    if isinstance(amount, Tensor):
        if amount.is_floating_point():
            raise ValueError(f"A tensor of counts for keep='topk' must be an integer one, got {amount.dtype}.")
        return amount
    if isinstance(amount, int):
        return amount
    if not 0 <= amount <= 1:
        raise ValueError(f"amount={amount} for keep='topk' must be an int (blocks) or a float between 0 and 1 (part).")
    return math.ceil(amount * cols - 1e-9)


def _check_choices(score: str, keep: str, stride: int | None, variance: str | None, lse: Tensor | None) -> None:
    if score not in ("mass", "pooled", "lse"):
        raise ValueError(f"Unknown score {score!r}. Choose 'mass', 'pooled' or 'lse'.")
    if keep not in ("topk", "topp", "threshold", "gaussian"):
        raise ValueError(f"Unknown rule keep={keep!r}. Choose 'topk', 'topp', 'threshold' or 'gaussian'.")
    if keep == "gaussian" and score != "pooled":
        raise ValueError(f"keep='gaussian' is a rule for score='pooled', got {score!r}. Leave score out.")
    if variance is not None and keep != "gaussian":
        raise ValueError(f"variance belongs to keep='gaussian', not to {keep!r}. Leave it out.")
    if stride is not None and score != "lse":
        raise ValueError(f"stride belongs to score='lse', not to {score!r}. Leave it out.")
    if lse is not None and score != "mass":
        raise ValueError(f"lse belongs to score='mass', not to {score!r}. Leave it out.")
