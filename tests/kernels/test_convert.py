"""Conversions of plans: nothing is lost, or they refuse."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from dit_accel.kernels import convert
from dit_accel.kernels.bitmap import Bitmap
from dit_accel.kernels.convert import (
    plan_from_block_map,
    plan_from_element_mask,
    plan_from_flex,
    plan_to_block_map,
    plan_to_flex,
)
from dit_accel.kernels.flex import mask as flex_mask
from dit_accel.kernels.pair_tests import Band, Neighborhood, PairTest
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

FRAMES, FRAME_TOKENS, TEXT = 5, 7 * 9, 11
TOKENS = FRAMES * FRAME_TOKENS + TEXT
BLOCKS = [(64, 64), (32, 128), (100, 37)]
LEADS = [(1, 1), (1, 2), (3, 1), (3, 2)]
TESTS = ["band", "sinks", "neighborhood", "permuted", "bitmap"]


def random_blocks(lead: tuple[int, int], block_q: int, block_kv: int, q_len: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    keep = torch.rand(*lead, -(-q_len // block_q), -(-TOKENS // block_kv), generator=generator) < 0.6
    keep[..., 1, :] = False
    return keep


def make_plan(lead: tuple[int, int], block_q: int, block_kv: int, kind: str, q_len: int = TOKENS) -> SparsePlan:
    """A random plan with an empty row of blocks; `TESTS` and "whole", "empty" are the kinds."""
    sizes: dict[str, Any] = {"q_len": q_len, "kv_len": TOKENS, "block_q": block_q, "block_kv": block_kv}
    keep = random_blocks(lead, block_q, block_kv, q_len)
    if kind == "empty":
        return plan_from_blocks(torch.zeros_like(keep), **sizes)
    widths = torch.tensor([FRAME_TOKENS, 20, 4, -1, 0], dtype=torch.int32)
    raster = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(8))
    tests: dict[str, PairTest] = {
        "band": Band(FRAME_TOKENS, widths, TOKENS - TEXT),
        "sinks": Band(FRAME_TOKENS, widths, TOKENS - TEXT, 30),
        "neighborhood": Neighborhood.of((FRAMES, 7, 9), (3, 3, 4), dilation=(1, 2, 1)),
        "permuted": Neighborhood.of((FRAMES, 7, 9), (3, 5, 7), raster=raster),
    }
    if kind == "bitmap":
        mask = torch.rand(*lead, q_len, TOKENS, generator=torch.Generator().manual_seed(9)) < 0.5
        tests[kind] = Bitmap.from_mask(mask, block_q=block_q, block_kv=block_kv)
    return plan_from_blocks(keep, pair_test=tests.get(kind), **sizes)


def flex_elements(block_mask: BlockMask, lead: tuple[int, int]) -> Tensor:
    """What a fused kernel computes: full blocks whole, partial blocks by the mask function, the rest not at all."""
    q_len, kv_len = block_mask.seq_lengths
    tested = create_mask(block_mask.mask_mod, *lead, q_len, kv_len, device="cpu")
    out = torch.zeros_like(tested)
    block_q, block_kv = block_mask.BLOCK_SIZE
    lists = [(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, False)]
    lists.append((block_mask.kv_num_blocks, block_mask.kv_indices, True))
    for counts, indices, test in lists:
        if counts is None or indices is None:
            continue
        for b, h, row in torch.cartesian_prod(*map(torch.arange, (*lead, counts.shape[-1]))).tolist():
            place = (b % counts.shape[0], h % counts.shape[1], row)
            for col in indices[place][: int(counts[place])].tolist():
                area = (b, h, slice(row * block_q, (row + 1) * block_q), slice(col * block_kv, (col + 1) * block_kv))
                assert not out[area].any(), "a block is listed twice"
                out[area] = tested[area] if test else True
    return out


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("block_q", "block_kv"), BLOCKS)
def test_block_maps_go_both_ways(lead: tuple[int, int], block_q: int, block_kv: int) -> None:
    keep = random_blocks(lead, block_q, block_kv)
    plan = plan_from_block_map(keep, q_len=TOKENS, kv_len=TOKENS, block_q=block_q, block_kv=block_kv)
    assert torch.equal(plan_to_block_map(plan), keep)
    assert torch.equal(plan.element_mask(), make_plan(lead, block_q, block_kv, "whole").element_mask())


def test_a_band_that_cuts_nothing_is_a_block_map() -> None:
    band = Band(64, torch.tensor([64, -1], dtype=torch.int32), 128)
    plan = plan_from_blocks(
        torch.ones(2, 2, dtype=torch.bool), q_len=128, kv_len=128, block_q=64, block_kv=64, pair_test=band
    )
    assert torch.equal(plan_to_block_map(plan)[0, 0], torch.eye(2, dtype=torch.bool))


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("block_q", "block_kv"), BLOCKS)
@pytest.mark.parametrize("kind", ["whole", "empty"])
def test_element_masks_go_both_ways(lead: tuple[int, int], block_q: int, block_kv: int, kind: str) -> None:
    plan = make_plan(lead, block_q, block_kv, kind, q_len=201)
    again = plan_from_element_mask(plan.element_mask(), block_q=block_q, block_kv=block_kv)
    assert torch.equal(again.to_bool(), plan.to_bool())
    assert torch.equal(again.element_mask(), plan.element_mask())
    assert again.density == pytest.approx(plan.density)
    if lead == (1, 1):
        flat = plan_from_element_mask(plan.element_mask()[0, 0], block_q=block_q, block_kv=block_kv)
        assert torch.equal(flat.to_bool(), plan.to_bool())


@pytest.mark.parametrize("place", [(0, 0), (200, 325), (99, 37)])
@pytest.mark.parametrize("kept", [True, False])
def test_an_element_mask_that_cuts_a_block_is_refused(place: tuple[int, int], kept: bool) -> None:
    mask = torch.full((2, 3, 201, TOKENS), not kept)
    mask[1, 2][place] = kept
    names = rf"1 blocks .* batch 1, head 2, query block {place[0] // 100}, key block {place[1] // 37}"
    with pytest.raises(ValueError, match=names):
        plan_from_element_mask(mask, block_q=100, block_kv=37)


@pytest.mark.parametrize("kind", ["whole", *TESTS, "empty"])
@pytest.mark.parametrize("lead", [(1, 1), (3, 2)])
def test_bitmaps_hold_any_element_mask(lead: tuple[int, int], kind: str) -> None:
    plan = make_plan(lead, 64, 32, kind)
    again = plan_from_element_mask(plan.element_mask(), block_q=64, block_kv=32, bitmap=True)
    assert torch.equal(again.element_mask(), plan.element_mask())
    assert again.density == pytest.approx(plan.density)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("block_q", "block_kv"), BLOCKS)
@pytest.mark.parametrize("kind", ["whole", *TESTS, "empty"])
def test_flex_says_what_the_plan_says(lead: tuple[int, int], block_q: int, block_kv: int, kind: str) -> None:
    plan = make_plan(lead, block_q, block_kv, kind)
    block_mask = plan_to_flex(plan)
    expected = plan.element_mask().expand(3, 2, -1, -1)
    assert (*block_mask.seq_lengths, *block_mask.BLOCK_SIZE) == (TOKENS, TOKENS, block_q, block_kv)
    assert torch.equal(flex_elements(block_mask, (3, 2)), expected)
    # Without torch.compile FlexAttention looks at nothing but the function.
    assert torch.equal(create_mask(block_mask.mask_mod, 3, 2, TOKENS, TOKENS, device="cpu"), expected)
    assert torch.equal(block_mask.to_dense().bool(), plan.to_bool())
    again = plan_from_flex(block_mask)
    assert torch.equal(again.element_mask(), plan.element_mask())
    assert torch.equal(again.to_bool(full_only=True), plan.to_bool(full_only=True))
    assert again.density == pytest.approx(plan.density)


@pytest.mark.parametrize("kind", ["whole", "sinks"])
def test_query_lists_for_the_backward_pass(kind: str) -> None:
    plan = make_plan((1, 2), 32, 64, kind)
    block_mask = plan_to_flex(plan)
    full, partial = plan.to_bool(full_only=True), plan.to_bool() & ~plan.to_bool(full_only=True)
    for counts, indices, blocks in (
        (block_mask.full_q_num_blocks, block_mask.full_q_indices, full),
        (block_mask.q_num_blocks, block_mask.q_indices, partial),
    ):
        assert counts is not None and indices is not None
        assert torch.equal(flex_mask._listed(counts, indices, blocks.shape[2]), blocks.transpose(2, 3))
    assert plan_to_flex(plan, backward=False).q_indices is None


def document(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Tokens of 64 see each other; head 1 sees everything, batch item 2 nothing."""
    return ((q // 64 == kv // 64) | (h == 1)) & (b != 2)


@pytest.mark.parametrize("block", [16, 64, (32, 64)])
@pytest.mark.parametrize("q_len", [TOKENS, 64, 1])
def test_block_masks_of_others(block: int | tuple[int, int], q_len: int) -> None:
    # FlexAttention calls every short last block partial, so the function has to be asked.
    block_mask = create_block_mask(document, 3, 2, q_len, TOKENS, device="cpu", BLOCK_SIZE=block)
    plan = plan_from_flex(block_mask)
    assert torch.equal(plan.element_mask(), create_mask(document, 3, 2, q_len, TOKENS, device="cpu"))
    assert plan.pair_test is None and plan.to_bool()[2].logical_not().all()


def test_a_block_mask_without_full_lists_or_function() -> None:
    counts, indices = (
        torch.tensor([[[2, 1]]], dtype=torch.int32),
        torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32),
    )
    plan = plan_from_flex(BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=64))
    assert plan.to_bool()[0, 0].tolist() == [[True, True], [False, True]]
    assert (plan.q_len, plan.kv_len, plan.pair_test) == (128, 128, None)


def test_a_function_that_cuts_blocks_is_refused() -> None:
    block_mask = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, 200, 200, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(ValueError, match=r"4 blocks .* batch 0, head 0, query block 0, key block 0"):
        plan_from_flex(block_mask)


def test_a_borrowed_mask_function_is_not_taken_for_its_band() -> None:
    """The function knows its plan, but another block mask or a wrapper means something else by it."""
    keep = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    keep[..., 3] = False
    band = Band(64, torch.tensor([64, 20, -1, -1, -1], dtype=torch.int32), 320)
    ours = plan_from_blocks(keep, q_len=384, kv_len=384, block_q=64, block_kv=64, pair_test=band)
    function = plan_to_flex(ours).mask_mod
    finer = create_block_mask(function, 1, 1, 384, 384, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match="kept in part"):
        plan_from_flex(finer)

    @functools.wraps(function)
    def whole(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return function(b, h, q, kv) | True

    lists = plan_to_flex(ours)
    wrapped = BlockMask.from_kv_blocks(lists.kv_num_blocks, lists.kv_indices, BLOCK_SIZE=64, mask_mod=whole)
    plan = plan_from_flex(wrapped)
    assert plan.pair_test is None and torch.equal(plan.to_bool(), ours.to_bool() & ~ours.to_bool(full_only=True))


def test_what_other_forms_cannot_say_is_refused() -> None:
    banded = make_plan((1, 1), 64, 64, "band")
    with pytest.raises(ValueError, match="partial blocks"):
        plan_to_block_map(banded)
    ordered = replace(make_plan((1, 1), 64, 64, "whole"), order=torch.arange(TOKENS))
    for convert_plan, target in ((plan_to_block_map, "a block map"), (plan_to_flex, "a BlockMask")):
        with pytest.raises(ValueError, match=rf"reorders tokens, and {target}"):
            convert_plan(ordered)


@pytest.mark.parametrize(
    ("mask", "block"),
    [
        (torch.ones(4, 4), 2),
        (torch.ones(1, 4, 4, dtype=torch.bool), 2),
        (torch.ones(4, 0, dtype=torch.bool), 2),
        (torch.ones(4, 4, dtype=torch.bool), 0),
    ],
)
def test_element_masks_that_make_no_sense(mask: Tensor, block: int) -> None:
    with pytest.raises(ValueError, match="An element mask is"):
        plan_from_element_mask(mask, block_q=block, block_kv=2)


def test_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert.flex_problem() is None
    monkeypatch.delattr("torch.nn.attention.flex_attention.AuxRequest")
    with pytest.raises(RuntimeError, match=r"pip install 'torch>=2\.9'"):
        plan_to_flex(make_plan((1, 1), 64, 64, "whole"))
