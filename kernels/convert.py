"""Plans to and from the forms others use: block maps, element masks and FlexAttention's `BlockMask`.

Every conversion is exact or refused; nothing is rounded to whole blocks on the way.  All of them but `plan_to_flex`
read a few numbers back from the device, so convert outside the hot loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .flex.mask import flex_problem, plan_from_flex, plan_to_flex, refuse_cut_blocks, refuse_order
from .sparse_plan import SparsePlan, plan_from_blocks

__all__ = [
    "flex_problem",
    "plan_from_block_map",
    "plan_from_element_mask",
    "plan_from_flex",
    "plan_to_block_map",
    "plan_to_flex",
]


def plan_to_block_map(plan: SparsePlan) -> Tensor:
    """Expands a plan that keeps whole blocks of tokens in their own order.

    `SparsePlan.to_bool` gives the listed blocks of any plan.

    Returns:
        bool `[B|1, H|1, NQ, NK]`.

    Raises:
        ValueError: The plan cuts blocks or reorders tokens, which a block map cannot say.
    """
    refuse_order(plan, "a block map")
    if plan.band is not None and bool((plan.full_counts < plan.counts).any()):
        raise ValueError(
            "The plan has partial blocks, and a block map knows whole blocks only. Use plan.element_mask() for single "
            "pairs, or plan.to_bool() for every block that is touched."
        )
    return plan.to_bool()


def plan_from_block_map(block_map: Tensor, *, q_len: int, kv_len: int, block_q: int, block_kv: int) -> SparsePlan:
    """Builds a plan of whole blocks; the inverse of `plan_to_block_map`.

    Args:
        block_map: bool `[B|1, H|1, NQ, NK]` or `[NQ, NK]`.
        q_len: Query tokens.
        kv_len: Key tokens.
        block_q: Queries per block.
        block_kv: Keys per block.

    Returns:
        The plan, on the device of `block_map`.

    Raises:
        ValueError: Shape or dtype do not fit.
    """
    return plan_from_blocks(
        block_map, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, method="block map"
    )


def plan_from_element_mask(mask: Tensor, *, block_q: int, block_kv: int) -> SparsePlan:
    """Builds a plan from single (query, key) pairs, if every block is kept or dropped as a whole.

    The way back is `SparsePlan.element_mask`.

    Args:
        mask: bool `[B|1, H|1, q_len, kv_len]` or `[q_len, kv_len]`.
        block_q: Queries per block.
        block_kv: Keys per block.

    Returns:
        The plan, on the device of `mask`.

    Raises:
        ValueError: Shape or dtype do not fit, or a block is kept in part; the message names one.
    """
    if mask.dtype != torch.bool or mask.ndim not in (2, 4) or 0 in mask.shape or min(block_q, block_kv) < 1:
        raise ValueError(
            "An element mask is a non-empty bool tensor [batch or 1, heads or 1, q_len, kv_len] or [q_len, kv_len], "
            f"cut into blocks of at least 1; got {mask.dtype} of shape {tuple(mask.shape)} and blocks of {block_q} x "
            f"{block_kv}."
        )
    mask = mask if mask.ndim == 4 else mask[None, None]
    keep = _any_in_blocks(mask, block_q, block_kv)
    cut = keep & _any_in_blocks(~mask, block_q, block_kv)
    refuse_cut_blocks(cut, "Smaller blocks may fit; for the band of a video mask use plan_from_blocks(band=)")
    q_len, kv_len = mask.shape[-2:]
    return plan_from_blocks(
        keep, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, method="element mask"
    )


def _any_in_blocks(mask: Tensor, block_q: int, block_kv: int) -> Tensor:
    """`[..., q_len, kv_len]` to `[..., NQ, NK]`: whether a block holds a True."""
    q_len, kv_len = mask.shape[-2:]
    padded = torch.nn.functional.pad(mask, (0, -kv_len % block_kv, 0, -q_len % block_q))
    return padded.unflatten(-1, (-1, block_kv)).any(-1).unflatten(-2, (-1, block_q)).any(-2)
