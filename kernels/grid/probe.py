"""What each of a few masks would cost a head, measured on some of its queries.

Sparse VideoGen (arXiv 2502.01776) samples queries, attends for them in full and under each mask, and takes the mask
whose output is nearer by mean squared error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..permute import inverse_order
from ..precision import in_full_precision
from ..search.inputs import softmax_scale
from .masks import Listed, Masks

_SCORE_BYTES = 256 << 20  # scores that are held at a time; as many again for each of their copies


class Probe(NamedTuple):
    """Which queries are asked, and what they see under each mask.

    Attributes:
        rows: int64 `[R]`, places of the queries in the sequence.
        kept: bool `[C, R, NK]`, key blocks that each of them sees.
        block_of: int64 `[C, N]`, the key block of every token of the sequence.
    """

    rows: Tensor
    kept: Tensor
    block_of: Tensor


def probe_of(masks: Masks, listed: Sequence[Listed], rows: Tensor) -> Probe:
    """What some queries see under masks.

    Args:
        masks: All of them together.
        listed: Each of them.
        rows: int64 `[R]`, places in the sequence.

    Returns:
        The probe, on the device of the masks.
    """
    device = masks.orders.device
    block_of, rows = inverse_order(masks.orders) // masks.block, rows.to(device)
    kept = [mask.blocks.to(device)[places[rows]] for mask, places in zip(listed, block_of, strict=True)]
    return Probe(rows, torch.stack(kept), block_of)


def mask_errors(q: Tensor, k: Tensor, v: Tensor | None, probe: Probe, *, scale: float | None = None) -> Tensor:
    """The mean squared error of attention under each mask, for the queries of a probe.

    Without values it is the error that values of variance 1 without any correlation would have on average: the
    squared distance between the two rows of attention weights.
    One operator while it is being compiled, so that compiled code chooses what eager code does.

    Args:
        q: `[B, H, N, D]`, float32, float16 or bfloat16, any strides.
        k: `[B, H, N, D]`, dtype and device of q.
        v: `[B, H, N, D]`, likewise, or None.
        probe: The queries.
        scale: Positive factor on the scores; `D ** -0.5` by default.

    Returns:
        float32 `[B, H, C]`.
    """
    factor = softmax_scale(scale, q.shape[-1])
    values = None if v is None else v.detach()
    run = grid_errors if torch.compiler.is_compiling() else _errors
    errors: Tensor = run(q.detach(), k.detach(), values, *probe, factor)
    return errors


def heads_at_a_time(q: Tensor, rows: Tensor, keys: int) -> int:
    """How many heads' scores fit into the memory that a probe may take."""
    return max(1, _SCORE_BYTES // (q.shape[0] * rows.shape[0] * keys * 4))


@in_full_precision
def _errors(
    q: Tensor, k: Tensor, v: Tensor | None, rows: Tensor, kept: Tensor, block_of: Tensor, scale: float
) -> Tensor:
    masks = kept.gather(-1, block_of[:, None].expand(-1, rows.shape[0], -1))
    asked = q.index_select(2, rows).float() * scale
    errors = asked.new_empty(*q.shape[:2], masks.shape[0])
    step = heads_at_a_time(q, rows, k.shape[2])
    for head in range(0, q.shape[1], step):
        part = slice(head, head + step)
        scores = asked[:, part] @ k[:, part].float().transpose(-1, -2)
        weights = scores.softmax(-1)
        for c, mask in enumerate(masks):
            lost = weights - scores.masked_fill(~mask, -torch.inf).softmax(-1)
            errors[:, part, c] = _mean_square(lost, None if v is None else v[:, part])
    return errors


def _mean_square(lost: Tensor, v: Tensor | None) -> Tensor:
    """Of the output, over queries and channels `[B, h]`, given what is lost of the weights, `[B, h, R, N]`."""
    if v is None:
        return lost.square().sum(-1).mean(-1)
    return (lost @ v.float()).square().mean((-1, -2))


# Spelled out, since older torch releases do not read postponed annotations such as `Tensor | None`.
_SCHEMA = "(Tensor q, Tensor k, Tensor? v, Tensor rows, Tensor kept, Tensor block_of, float scale) -> Tensor"

grid_errors = torch.library.custom_op("dit_accel::grid_errors", _errors, mutates_args=(), schema=_SCHEMA)
"""The measurement as one operator."""


@grid_errors.register_fake
def _(q: Tensor, k: Tensor, v: Tensor | None, rows: Tensor, kept: Tensor, block_of: Tensor, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:2], kept.shape[0], dtype=torch.float32)
