"""Agent attention beside exact attention: a few tokens, such as text, are seen and see without agents.

A query q weighs the keys it sees exactly (set E) and those it sees through agents (set G) in one softmax:

    out = (Z_E out_E + Z_G out_G) / (Z_E + Z_G),    Z = the sum of exponentials of its scores over a set

Z_E and out_E are exact.  out_G is what the agents give.  Z_G would need all scores of the query; it is taken from the
agents as out_G is, by the weights P of the second softmax:

    log Z_G(q) = sum over agents a of P_qa log Z_G(a)

It is exact where the second softmax falls on one agent that equals the query.

Agents: Han et al., ECCV 2024, arXiv 2312.08874; exact parts and their weight are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attend import attend
from ..merge import merge_attention
from ..sparse_plan import SparsePlan, plan_from_blocks
from .attention import SECOND_SCALE_POWER, SHORTCUT

_LANES = 8  # columns for one number: fused kernels want a head dimension that is a multiple of it


def full_plan(q_len: int, kv_len: int, block: int, device: torch.device) -> SparsePlan:
    """A plan that keeps every pair, for attention that also gives its log-sum-exps."""
    keep = torch.ones(-(-q_len // block), -(-kv_len // block), dtype=torch.bool, device=device)
    return plan_from_blocks(keep, q_len=q_len, kv_len=kv_len, block_q=block, block_kv=block, method="full")


def agent_attention_beside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    exact_k: Tensor,
    exact_v: Tensor,
    *,
    gather: SparsePlan,
    exact: SparsePlan,
    scale: float | None = None,
    second_scale_power: float = SECOND_SCALE_POWER,
    shortcut: float = SHORTCUT,
    backend: str = "auto",
) -> Tensor:
    """Attends to some keys through agents and to others exactly, in one softmax.

    Args:
        q: `[B, H, N, D]`.
        k: `[B, H, N, D]`, seen through agents.
        v: `[B, H, N, D]`.
        agents: `[B, H, n, D]`.
        exact_k: `[B, H, E, D]`.
        exact_v: `[B, H, E, D]`.
        gather: `full_plan` of the agents and k.
        exact: `full_plan` of q and exact_k.
        scale: Of scores with keys, `D ** -0.5` by default.
        second_scale_power: Of scores with agents, see `agent_attention`.
        shortcut: Share of v that is added to the output.
        backend: Of the two parts with plans, see `attend`.

    Returns:
        `[B, H, N, D]`, dtype of q.

    Raises:
        ValueError: Tensors and plans do not fit together.
    """
    first = q.shape[-1] ** -0.5 if scale is None else float(scale)
    gathered, lse = attend(agents, k, v, gather, scale=first, return_lse=True, backend=backend)
    middle = lse.mean(-1, keepdim=True)  # what is carried in a small dtype is small, too
    beside = F.pad((lse - middle).to(v.dtype)[..., None], (0, _LANES - 1))
    wide_q, wide_agents = F.pad(q, (0, _LANES)), F.pad(agents, (0, _LANES))
    values = torch.cat((gathered, beside), -1)
    seen = F.scaled_dot_product_attention(wide_q, wide_agents, values, scale=first**second_scale_power)
    through, lse_through = seen[..., : v.shape[-1]], seen[..., v.shape[-1]].to(lse.dtype) + middle
    direct, lse_direct = attend(q, exact_k, exact_v, exact, scale=first, return_lse=True, backend=backend)
    out, _ = merge_attention((through, direct), (lse_through, lse_direct))
    return out + shortcut * v if shortcut else out
