"""Sol-Attn's rule (arXiv 2607.24027): a block is kept if its score stands out among those of its row.

The scores of a row's mean query against all mean keys are taken for a Gaussian sample; blocks more than `tau` standard
deviations above the mean are kept.  How many that are follows from the data (for Gaussian scores 16, 7 and 2.3 % at
tau 1, 1.5 and 2), and nothing has to be sorted.  Made for `block_residual`, which stands in for the others.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .inputs import check_search, softmax_scale
from .pooled import block_means
from .select import select_threshold

Variance = Literal["diag", "exact"]

# What keeps a row without any spread from having a threshold that rounding decides, in squared base-2 scores.
_VARIANCE_FLOOR = 1e-6


def select_gaussian(
    q: Tensor,
    k: Tensor,
    tau: float | Tensor,
    *,
    block_q: int,
    block_kv: int,
    variance: Variance = "diag",
    scale: float | None = None,
    always: Tensor | None = None,
    minimum: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Keeps the blocks whose mean score exceeds the row's mean by `tau` standard deviations, and those beside the row.

    With `a = scale * log2(e)`, mean query c_i and mean keys k_j, block j of row i is kept if
    `a * c_i . k_j > a * c_i . mean(k) + tau * sqrt(a ** 2 * var_i + 1e-6)`.  If there are as many queries as keys,
    blocks at a distance of at most one block are kept as well (`|i - j| <= 1` for blocks of one size).

    Args:
        q: `[B, q_len, H, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, kv_len, H, D]`, dtype and device of q.
        tau: Standard deviations above the mean.  A tensor that broadcasts to `[B, H, rows]` sets it per head or row.
        block_q: Queries per block; the last block may be short.
        block_kv: Keys per block, likewise.
        variance: "exact" takes var_i from the scores of the row, `c_i^T Cov(k) c_i`; "diag" leaves out what dimensions
            have in common, `sum_d c_id ** 2 Var(k_d)`.
        scale: Positive factor on the scores; `D ** -0.5` by default.
        always: bool, broadcasts to the result: blocks to keep in any case, such as text.
        minimum: Blocks that a row keeps at least, the best ones.
        backend: Who takes the means: "auto", "torch" or "triton".

    Returns:
        bool `[B, H, ceil(q_len / block_q), ceil(kv_len / block_kv)]`.

    Raises:
        ValueError: Arguments do not fit together, or the named backend cannot run the call.
    """
    check_search(q, k, block_q, block_kv)
    if variance not in ("diag", "exact"):
        raise ValueError(f"Unknown variance {variance!r}. Choose 'diag' or 'exact'.")
    mean_q = block_means(q, block_q, backend=backend) * (softmax_scale(scale, q.shape[-1]) * math.log2(math.e))
    mean_k = block_means(k, block_kv, backend=backend)
    scores = mean_q @ mean_k.transpose(-1, -2)
    if variance == "exact":
        spread = scores.var(-1, correction=0, keepdim=True)
    else:
        spread = mean_q.square() @ mean_k.var(2, correction=0)[..., None]
    tau = tau[..., None] if isinstance(tau, Tensor) else tau
    kept = scores > scores.mean(-1, keepdim=True) + tau * (spread + _VARIANCE_FLOOR).sqrt()
    certain = 0
    if q.shape[1] == k.shape[1]:
        kept, certain = kept | neighbor_blocks(q.shape[1], block_q, block_kv, device=q.device), 1
    # No score reaches infinity: this adds the always-kept blocks, and ranks only if a row could hold too few.
    return kept | select_threshold(scores, math.inf, always=always, minimum=0 if 0 <= minimum <= certain else minimum)


def neighbor_blocks(length: int, block_q: int, block_kv: int, *, device: torch.device | str | None = None) -> Tensor:
    """Marks the key blocks that touch the tokens of a query block or lie right beside them.

    Args:
        length: Tokens, the same for queries and keys.
        block_q: Queries per block.
        block_kv: Keys per block.
        device: Where the result lives.

    Returns:
        bool `[ceil(length / block_q), ceil(length / block_kv)]`.
    """
    rows = torch.arange(0, length, block_q, device=device)[:, None]
    cols = torch.arange(0, length, block_kv, device=device)
    return (cols < rows + block_q + block_kv) & (cols + 2 * block_kv > rows)
