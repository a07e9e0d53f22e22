"""Gradients of attention from its output and log-sum-exp: the formulas, and their dense form in float32.

With scores `s = scale * q k^T`, weights `p = exp(s - lse)`, `out = p v` and `lse = log sum exp(s)`:

    delta = sum(out * grad_out) - grad_lse          one number per query
    grad_s = p * (grad_out v^T - delta)
    grad_q = scale * grad_s k,    grad_k = scale * grad_s^T q,    grad_v = p^T grad_out

(FlashAttention-2, arXiv 2307.08691, section 2.3.2; the gradient of lse enters through delta, since d lse / d s = p.)
Which blocks are listed is a choice, not a function of q and k: nothing is differentiated through the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .sparse_plan import SparsePlan

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class BackwardInputs:
    """What the forward pass left behind and what arrives from above.

    Attributes:
        q: `[B, H, q_len, D]`.
        k: `[B, H, kv_len, D]`.
        v: `[B, H, kv_len, D]`.
        out: `[B, H, q_len, D]`, output of the forward pass.
        lse: float32 `[B, H, q_len]`, its log-sum-exp, natural log; -inf for a query without any key.
        grad_out: Like out, any strides.
        grad_lse: Like lse, any strides.
        need_q: Whether the gradient of q is asked for.
        need_kv: Whether the gradients of k and v are asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    need_q: bool = True
    need_kv: bool = True


def softmax_delta(out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> Tensor:
    """Computes `sum(out * grad_out) - grad_lse` per query.

    Args:
        out: `[..., S, D]`.
        lse: float32 `[..., S]`.
        grad_out: `[..., S, D]`.
        grad_lse: `[..., S]`.

    Returns:
        float32 `[..., S]`; 0 for a query without any key, whatever arrives there (merging by log-sum-exp likes to send
        NaN to a lse of -inf).
    """
    delta = (out.float() * grad_out.float()).sum(-1) - grad_lse.float()
    return delta.masked_fill(lse == float("-inf"), 0.0)


def softmax_lse(lse: Tensor) -> Tensor:
    """Turns -inf into +inf, so that `exp(score - lse)` is 0 and never NaN for a query without any key."""
    return lse.masked_fill(lse == float("-inf"), float("inf"))


def score_gradient(scores: Tensor, lse: Tensor, delta: Tensor, grad_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Recomputes the weights and differentiates through the softmax; overwrites `scores` and `grad_weights`.

    Args:
        scores: float32 `[..., M, L]`, scaled, -inf where masked.
        lse: `[..., M]`, of `softmax_lse`.
        delta: `[..., M]`, of `softmax_delta`.
        grad_weights: float32 `[..., M, L]`, `grad_out v^T`.

    Returns:
        `(weights, grad_scores)`, both `[..., M, L]`.
    """
    weights = scores.sub_(lse[..., None]).exp_()
    return weights, grad_weights.sub_(delta[..., None]).mul_(weights)


def reference_backward(inputs: BackwardInputs, plan: SparsePlan, scale: float) -> Gradients:
    """Gradients with every score held in memory, one head at a time.  Slow and simple.

    Args:
        inputs: Tensors of the forward pass and incoming gradients.
        plan: Who attends to whom.  Its `order` is respected here too.
        scale: Factor on the scores.

    Returns:
        `(grad_q, grad_k, grad_v)` in the dtypes and shapes of q, k and v.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, heads = q.shape[:2]
    mask = plan.element_mask().expand(batch, heads, -1, -1)
    delta = softmax_delta(inputs.out, inputs.lse, inputs.grad_out, inputs.grad_lse)
    lse = softmax_lse(inputs.lse)
    grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for b in range(batch):
        for h in range(heads):
            qh, kh, vh, grad = (t[b, h].float() for t in (q, k, v, inputs.grad_out))
            scores = (qh @ kh.T * scale).masked_fill_(~mask[b, h], float("-inf"))
            weights, grad_scores = score_gradient(scores, lse[b, h], delta[b, h], grad @ vh.T)
            for target, value in zip(
                grads, (grad_scores @ kh * scale, grad_scores.T @ qh * scale, weights.T @ grad), strict=True
            ):
                target[b, h] = value.to(target.dtype)
    return grads
