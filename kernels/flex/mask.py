"""Plans as FlexAttention's `BlockMask`, and back.  Use both through `dit_accel.kernels.convert`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..sparse_plan import SparsePlan, plan_from_blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# What a block of a plan is, as `plan_to_flex` writes it down for the element test.
_FULL, _PARTIAL = 1, 2


def plan_to_flex(plan: SparsePlan, *, backward: bool = True) -> BlockMask:
    """Writes a plan as FlexAttention's `BlockMask` (arXiv 2412.05496), full and partial blocks apart.

    The mask function tests block membership as well as the pair test, so it alone defines the mask; FlexAttention
    without torch.compile reads nothing else.  No host synchronisation.

    Args:
        plan: Who attends to whom.
        backward: Also list the query blocks of each key block, which FlexAttention's backward needs.

    Returns:
        The block mask, on the device of the plan.

    Raises:
        ValueError: The plan reorders tokens.
        RuntimeError: This torch has no fitting FlexAttention.
    """
    refuse_order(plan, "a BlockMask")
    if (problem := flex_problem()) is not None:
        raise RuntimeError(f"A plan cannot be converted: {problem}.")
    from torch.nn.attention.flex_attention import BlockMask

    full = plan.counts if plan.pair_test is None else plan.full_counts
    # The lists must be as wide as there are key blocks: FlexAttention takes the number of columns from them.
    listed = torch.nn.functional.pad(plan.indices, (0, plan.num_kv_blocks))[..., : plan.num_kv_blocks]
    slots = torch.arange(plan.num_kv_blocks, device=plan.device)
    shifted = (slots + full[..., None]).clamp(max=plan.num_kv_blocks - 1).long()
    return BlockMask.from_kv_blocks(
        (plan.counts - full).contiguous(),
        listed.gather(-1, shifted),
        full.contiguous(),
        listed.contiguous(),
        BLOCK_SIZE=(plan.block_q, plan.block_kv),
        mask_mod=_mask_function(plan),
        seq_lengths=(plan.q_len, plan.kv_len),
        compute_q_blocks=backward,
    )


def plan_from_flex(block_mask: BlockMask) -> SparsePlan:
    """Reads a plan off FlexAttention's `BlockMask`.

    The pair test of a mask made by `plan_to_flex` is kept.  Otherwise the mask function is evaluated on the partial
    blocks, one row of blocks at a time; blocks it leaves whole become full, blocks it empties are dropped.

    Args:
        block_mask: Any block mask, for whatever batch and heads it was made.

    Returns:
        The plan, on the device of the block mask.

    Raises:
        ValueError: The mask function keeps a part of a block, which a plan cannot say; the message names one.
    """
    q_len, kv_len = block_mask.seq_lengths
    block_q, block_kv = block_mask.BLOCK_SIZE
    sizes: dict[str, Any] = {"q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}
    cols = -(-kv_len // block_kv)
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, cols)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, cols)
    source = _source_plan(block_mask.mask_mod)
    if source is not None and _lists_partial_blocks_of(source, partial, (q_len, kv_len, block_q, block_kv)):
        return plan_from_blocks(full | partial, partial=partial, pair_test=source.pair_test, method="flex", **sizes)
    keep, drop = _test_partial(block_mask.mask_mod, partial, **sizes)
    refuse_cut_blocks(
        keep & drop, "Give a pair test to plan_from_blocks(pair_test=), or keep FlexAttention for this mask"
    )
    return plan_from_blocks(full | keep, method="flex", **sizes)


def flex_problem() -> str | None:
    """Says why torch's FlexAttention cannot be used here, or None."""
    try:
        from torch.nn.attention import flex_attention
    except ImportError as error:
        return f"torch {torch.__version__} has no FlexAttention ({error})"
    if not hasattr(flex_attention, "AuxRequest"):
        return f"torch {torch.__version__} has an older FlexAttention; run: pip install 'torch>=2.9'"
    return None


def _mask_function(plan: SparsePlan) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The plan as a function of (batch, head, query, key).  Loose variables, since torch.compile guards on objects."""
    full = plan.to_bool(full_only=True)
    kinds = plan.to_bool().to(torch.int8) * _PARTIAL
    kinds = torch.where(full, _FULL, kinds).to(torch.int8)
    batch_step, head_step = (int(size > 1) for size in kinds.shape[:2])
    block_q, block_kv, test = plan.block_q, plan.block_kv, plan.pair_test

    def kind(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kinds[b * batch_step, h * head_step, q // block_q, kv // block_kv]

    if test is None:

        def keeps_block(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return kind(b, h, q, kv) != 0

        return keeps_block

    def keeps_pair(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        found = kind(b, h, q, kv)
        return (found == _FULL) | ((found == _PARTIAL) & test.keeps_in(b, h, q, kv))

    keeps_pair.plan = plan  # type: ignore[attr-defined]
    return keeps_pair


def _source_plan(mask_mod: Callable[..., Tensor]) -> SparsePlan | None:
    """The plan, with a pair test, behind a mask function of `plan_to_flex`; functools.wraps copies only the mark."""
    plan = None if hasattr(mask_mod, "__wrapped__") else getattr(mask_mod, "plan", None)
    return plan if isinstance(plan, SparsePlan) else None


def _lists_partial_blocks_of(plan: SparsePlan, partial: Tensor, sizes: tuple[int, int, int, int]) -> bool:
    """Whether the pair test alone decides inside all of `partial`: same blocks, and partial in `plan` as well."""
    if sizes != (plan.q_len, plan.kv_len, plan.block_q, plan.block_kv):
        return False
    cut = plan.to_bool() & ~plan.to_bool(full_only=True)
    fits = all(size in (1, other) for size, other in zip(cut.shape, partial.shape, strict=True))
    return fits and not bool((partial & ~cut).any())


def _listed(counts: Tensor, indices: Tensor, cols: int) -> Tensor:
    """Padded rows of a BlockMask `[..., NQ]`, `[..., NQ, K]` as bool `[B, H, NQ, NK]`."""
    counts, indices = (t.reshape((1,) * (n - t.ndim) + t.shape) for t, n in ((counts, 3), (indices, 4)))
    slots = torch.arange(indices.shape[-1], device=indices.device)
    target = torch.where(slots < counts[..., None], indices, cols).long()
    out = torch.zeros(*counts.shape, cols + 1, dtype=torch.bool, device=indices.device)
    return out.scatter_(-1, target, True)[..., :-1]


def _test_partial(
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    partial: Tensor,
    *,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
) -> tuple[Tensor, Tensor]:
    """Says in which partial blocks `mask_mod` keeps some pair, and in which it drops one; both like `partial`."""
    keep, drop = torch.zeros_like(partial), torch.zeros_like(partial)
    # A mask function is written for single pairs, and FlexAttention maps it over positions in this way.
    over_kv = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_both = torch.vmap(over_kv, in_dims=(None, None, 0, None))
    numbers = torch.arange(max(partial.shape), device=partial.device)
    offsets = torch.arange(block_kv, device=partial.device)
    for b, h, row in partial.any(-1).nonzero().tolist():
        cols = partial[b, h, row].nonzero()[:, 0]
        q = torch.arange(row * block_q, min((row + 1) * block_q, q_len), device=partial.device)
        kv = (cols[:, None] * block_kv + offsets).reshape(-1)
        inside = kv < kv_len
        # Mask functions look things up by position, so they are never asked about tokens that do not exist.
        kept = over_both(numbers[b], numbers[h], q, kv.clamp(max=kv_len - 1))
        keep[b, h, row, cols] = (kept & inside).any(0).view(-1, block_kv).any(-1)
        drop[b, h, row, cols] = (~kept & inside).any(0).view(-1, block_kv).any(-1)
    return keep, drop


def refuse_order(plan: SparsePlan, target: str) -> None:
    """Raises ValueError for a plan with a token order, naming the form that cannot hold it."""
    if plan.key_order is not None or plan.order is not None:
        raise ValueError(
            f"The plan reorders tokens, and {target} cannot say so. Permute q with plan.order, k and v with "
            "plan.key_order yourself, and convert dataclasses.replace(plan, order=None, kv_order=None)."
        )


def refuse_cut_blocks(cut: Tensor, advice: str) -> None:
    """Raises ValueError if bool `cut` `[B, H, NQ, NK]` marks any block, naming the first one."""
    places = cut.nonzero()
    if len(places):
        b, h, row, col = places[0].tolist()
        raise ValueError(
            f"{len(places)} blocks are kept in part, the first one in batch {b}, head {h}, query block {row}, key "
            f"block {col}; a plan keeps or drops whole blocks unless a pair test cuts them. {advice}."
        )
