"""Attention over a large key set, put together from attention over its parts.

A part knows its weighted mean and the log-sum-exp of its scores, and that is all the others need: the mean over the
union weighs each part by `exp(lse_part - lse_union)`.  Text columns beside a video plan, keys from another device (as
in ring attention, arXiv 2310.01889) and dense attention beside gathered blocks are combined this way, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combines attention over disjoint key sets into attention over their union.

    Exact up to rounding, differentiable in outputs and log-sum-exps, independent of the order of the parts up to
    rounding.  Sums run in float32 (float64 for float64 parts).  Over many steps (ring attention) keep the running
    output in float32, so that it is rounded once.

    Args:
        outputs: Two or more `[B or 1, H or 1, S, D]`: what attention over each key set gave.
        lses: For each of them `[B or 1, H or 1, S]`, log-sum-exp of the scaled scores in natural log.  -inf marks a
            query without any key in that part; the output there is not used, whatever it holds.

    Returns:
        `(out, lse)`: out `[B, H, S, D]` in the widest dtype of `outputs`, lse `[B, H, S]` in float32 (or float64).  A
        query without any key in all parts gets out 0 and lse -inf.

    Raises:
        ValueError: Fewer than two parts, or parts that do not fit together.
    """
    _check_parts(outputs, lses)
    dtype = torch.float32
    for tensor in (*outputs, *lses):
        dtype = torch.promote_types(dtype, tensor.dtype)
    shape = torch.broadcast_shapes(*(lse.shape for lse in lses), *(out.shape[:-1] for out in outputs))
    wide = [lse.to(dtype).expand(shape) for lse in lses]
    # The result does not depend on the shift, so no gradient goes through it; -inf would turn the exponents to NaN.
    top = _largest(wide).detach()
    weights = [torch.exp(lse - top) for lse in wide]
    total = sum(weights[1:], weights[0])
    some = total > 0
    # Unused branches of where() must be finite too, or their gradient is 0 * inf.
    total = torch.where(some, total, 1.0)
    out = torch.zeros((), dtype=dtype, device=total.device)
    for weight, part in zip(weights, outputs, strict=True):
        used = (weight > 0)[..., None]
        out = out + torch.where(used, part.to(dtype), 0.0) * (weight / total)[..., None]
    lse = torch.where(some, top + torch.log(total), float("-inf"))
    return out.to(_widest(outputs)), lse


def _largest(lses: Sequence[Tensor]) -> Tensor:
    top = lses[0]
    for lse in lses[1:]:
        top = torch.maximum(top, lse)
    return top.masked_fill(top.isneginf(), 0.0)


def _widest(outputs: Sequence[Tensor]) -> torch.dtype:
    dtype = outputs[0].dtype
    for output in outputs[1:]:
        dtype = torch.promote_types(dtype, output.dtype)
    return dtype


def _check_parts(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outputs) < 2 or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attention takes two or more outputs with one lse each, got {len(outputs)} outputs and "
            f"{len(lses)} lses."
        )
    tokens, dim = outputs[0].shape[-2:] if outputs[0].ndim == 4 else (0, 0)
    for index, (out, lse) in enumerate(zip(outputs, lses, strict=True)):
        if out.ndim != 4 or lse.ndim != 3 or out.shape[-2] != lse.shape[-1] or out.shape[-2:] != (tokens, dim):
            raise ValueError(
                f"Part {index} has an output of shape {tuple(out.shape)} and an lse of shape {tuple(lse.shape)}; "
                f"all parts need [batch or 1, heads or 1, {tokens or 'tokens'}, {dim or 'head_dim'}] and the same "
                "without head_dim."
            )
        if not (out.is_floating_point() and lse.is_floating_point()) or out.device != lse.device:
            raise ValueError(
                f"Part {index} has a {out.dtype} output on {out.device} and a {lse.dtype} lse on {lse.device}; "
                "both must be floating point and on one device."
            )
    _check_broadcast(outputs, lses)


def _check_broadcast(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if any(out.device != outputs[0].device for out in outputs):
        raise ValueError(f"The parts are on {sorted({str(out.device) for out in outputs})}. Move them to one device.")
    for axis, name in ((0, "batch"), (1, "heads")):
        sizes = {tensor.shape[axis] for tensor in (*outputs, *lses)} - {1}
        if len(sizes) > 1:
            raise ValueError(f"The parts have different sizes of {name}: {sorted(sizes)}. Each may be 1 or the same.")
