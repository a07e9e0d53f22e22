"""Plans to and from the forms others use: block maps, element masks and FlexAttention's `BlockMask`.

Every conversion is exact or refused; nothing is rounded to whole blocks on the way.  All of them but `plan_to_flex`
read a few numbers back from the device, so convert outside the hot loop.
"""

from __future__ import annotations

from torch import Tensor

from .bitmap import Bitmap, blocks_of_mask, check_element_mask
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
    if plan.pair_test is not None and bool((plan.full_counts < plan.counts).any()):
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


def plan_from_element_mask(mask: Tensor, *, block_q: int, block_kv: int, bitmap: bool = False) -> SparsePlan:
    """Builds a plan from single (query, key) pairs.

    The way back is `SparsePlan.element_mask`.

    Args:
        mask: bool `[B|1, H|1, q_len, kv_len]` or `[q_len, kv_len]`.
        block_q: Queries per block.
        block_kv: Keys per block.
        bitmap: Write blocks that are kept in part as a `Bitmap`; slow, but any mask can be said.

    Returns:
        The plan, on the device of `mask`.

    Raises:
        ValueError: Shape or dtype do not fit, or, without `bitmap`, a block is kept in part; the message names one.
    """
    check_element_mask(mask, block_q, block_kv)
    mask = mask if mask.ndim == 4 else mask[None, None]
    keep, cut = blocks_of_mask(mask, block_q, block_kv)
    test = Bitmap.from_mask(mask, block_q=block_q, block_kv=block_kv) if bitmap else None
    if test is None:
        refuse_cut_blocks(cut, "Smaller blocks may fit; bitmap=True keeps single pairs, at some cost in speed")
    q_len, kv_len = mask.shape[-2:]
    return plan_from_blocks(
        keep, pair_test=test, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, method="element mask"
    )
