"""Agent attention: queries and keys meet in a few agent tokens instead of with each other.

Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874.
The defaults are those of its training-free use in diffusion models (AgentSD).

    V_A = softmax(A Kᵀ c₁) V          n agents gather from all keys
    O   = softmax(Q Aᵀ c₂) V_A + s V  all queries read from the agents

Cost is O(N n D) in time and O((N + n) D) in memory for n agents, where softmax attention takes O(N² D).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SECOND_SCALE_POWER = 0.3
SHORTCUT = 0.075


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    scale: float | None = None,
    second_scale_power: float = SECOND_SCALE_POWER,
    shortcut: float = SHORTCUT,
) -> Tensor:
    """Attends from queries to keys through agent tokens, by two calls of dense attention.

    All rows go through the agents.  Where some must stay exact (text queries), compute these by dense attention and
    put them in place of the rows here.  Differentiable in all four tensors.  N x N scores are never held, N x n scores
    only where PyTorch has no fused kernel for the call.

    Args:
        q: `[B, H, q_len, D]`, any strides.
        k: `[B, H, kv_len, D]`.
        v: `[B, H, kv_len, D]`.
        agents: `[B or 1, H or 1, n, D]`: pooled queries (`pooled_agents`), or the projected queries of merged tokens.
        scale: c₁, positive; `D ** -0.5` by default.
        second_scale_power: c₂ is `scale` to this power; below 1 it sharpens the second softmax.  The trained model of
            the paper takes 1.
        shortcut: s, the share of v that is added to the output.  With 0, queries and keys may differ in number.

    Returns:
        `[B, H, q_len, D]`, dtype of q.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, scale is not positive, or a shortcut from another number of
            keys than of queries.
    """
    _check(q, k, v, agents, scale, shortcut)
    first = q.shape[-1] ** -0.5 if scale is None else float(scale)
    agents = agents.expand(q.shape[0], q.shape[1], -1, -1)
    gathered = F.scaled_dot_product_attention(agents, k, v, scale=first)
    out = F.scaled_dot_product_attention(q, agents, gathered, scale=first**second_scale_power)
    return out + shortcut * v if shortcut else out


def _check(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, scale: float | None, shortcut: float) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v), ("agents", agents)):
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name} must be [batch, heads, tokens, head_dim], none of them 0, got shape {tuple(tensor.shape)}."
            )
        if tensor.dtype != q.dtype or tensor.device != q.device or not tensor.is_floating_point():
            raise ValueError(
                f"q is {q.dtype} on {q.device}, {name} is {tensor.dtype} on {tensor.device}. All four must be of one "
                "floating-point dtype and on one device."
            )
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together: batch, heads and "
            "head_dim must be equal, and k and v alike. Repeat key heads before the call if there are fewer."
        )
    fits = all(size in (1, wanted) for size, wanted in zip(agents.shape[:2], q.shape[:2], strict=True))
    if not fits or agents.shape[3] != q.shape[3]:
        raise ValueError(
            f"agents have shape {tuple(agents.shape)}; these queries need [1 or {q.shape[0]}, 1 or {q.shape[1]}, "
            f"agents, {q.shape[3]}]."
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}. Leave it out for head_dim ** -0.5.")
    if shortcut and q.shape[2] != v.shape[2]:
        raise ValueError(
            f"The shortcut adds v to the output token by token, but there are {q.shape[2]} queries and {v.shape[2]} "
            "keys. Pass shortcut=0."
        )
