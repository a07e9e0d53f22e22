"""Plans: lists, exact density, expansion to masks, and what they refuse."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import PlanStats, SparsePlan, plan_from_blocks

FRAMES, FRAME_TOKENS, TEXT = 7, 15 * 13, 30
TOKENS = FRAMES * FRAME_TOKENS


def make_band(sink: int = 0) -> Band:
    widths = torch.tensor([FRAME_TOKENS, 80, 40, 11, 0, -1, 3], dtype=torch.int32)
    return Band(FRAME_TOKENS, widths, TOKENS, sink)


def blocks(q_len: int, kv_len: int, block_q: int, block_kv: int, *lead: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*lead, -(-q_len // block_q), -(-kv_len // block_kv), generator=generator) < 0.5


def brute_mask(keep: Tensor, partial: Tensor | None, band: Band | None, shape: tuple[int, int, int, int]) -> Tensor:
    """Expands block masks with one comparison per pair, independently of SparsePlan."""
    q_len, kv_len, block_q, block_kv = shape
    q, kv = torch.arange(q_len), torch.arange(kv_len)
    mask = keep[..., q // block_q, :][..., kv // block_kv]
    if partial is not None and band is not None:
        in_partial = partial[..., q // block_q, :][..., kv // block_kv]
        mask = mask & (~in_partial | brute_band(band, q_len, kv_len))
    return mask


def brute_band(band: Band, q_len: int, kv_len: int) -> Tensor:
    widths, s = band.widths.tolist(), band.frame_tokens
    out = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for first in range(0, q_len, s):
        for second in range(0, kv_len, s):
            last_q, last_kv = min(first + s, q_len), min(second + s, kv_len)
            k, j = torch.arange(last_q - first)[:, None], torch.arange(last_kv - second)[None]
            if first < band.video_len and second < band.video_len:
                out[first:last_q, second:last_kv] = (k - j).abs() <= widths[abs(first - second) // s]
    out[band.video_len :] = True
    out[:, band.video_len :] = True
    out[:, : band.sink_tokens] = True
    return out


@pytest.mark.parametrize("lead", [(), (1, 1), (2, 3)])
@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 128), (64, 128), (100, 37)])
def test_block_mask_survives_the_round_trip(lead: tuple[int, ...], block_q: int, block_kv: int) -> None:
    keep = blocks(TOKENS, 900, block_q, block_kv, *lead)
    keep[..., 1, :] = False
    plan = plan_from_blocks(keep, q_len=TOKENS, kv_len=900, block_q=block_q, block_kv=block_kv)
    assert torch.equal(plan.to_bool(), keep.reshape(plan.to_bool().shape))
    assert plan.counts.dtype == plan.indices.dtype == torch.int32
    assert plan.counts[..., 1].eq(0).all()


@pytest.mark.parametrize("lead", [(1, 1), (2, 3)])
def test_lists_hold_full_then_partial_blocks_ascending(lead: tuple[int, int]) -> None:
    keep = blocks(TOKENS, TOKENS, 128, 128, *lead)
    partial = keep & blocks(TOKENS, TOKENS, 128, 128, *lead, seed=1)
    sizes: dict[str, Any] = {"q_len": TOKENS, "kv_len": TOKENS, "block_q": 128, "block_kv": 128}
    plan = plan_from_blocks(keep, partial=partial, pair_test=make_band(), **sizes)
    assert torch.equal(plan.to_bool(full_only=True), keep & ~partial)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in plan.counts.shape)).tolist():
        b, h, row = place
        count, full = int(plan.counts[b, h, row]), int(plan.full_counts[b, h, row])
        wanted_full = (keep & ~partial)[b, h, row].nonzero()[:, 0].tolist()
        wanted_partial = partial[b, h, row].nonzero()[:, 0].tolist()
        listed = plan.indices[b, h, row].tolist()
        assert listed[:full] == wanted_full
        assert listed[full:count] == wanted_partial
        assert not any(listed[count:])


def test_without_its_test_a_plan_lists_all_blocks_ascending_as_full() -> None:
    keep = blocks(TOKENS, TOKENS, 128, 128, 2, 3)
    partial = keep & blocks(TOKENS, TOKENS, 128, 128, 2, 3, seed=1)
    sizes: dict[str, Any] = {"q_len": TOKENS, "kv_len": TOKENS, "block_q": 128, "block_kv": 128}
    cut = plan_from_blocks(keep, partial=partial, pair_test=make_band(), **sizes)
    whole = replace(cut, pair_test=None)
    expected = plan_from_blocks(keep, **sizes)
    assert not torch.equal(cut.indices, expected.indices), "the plan had no PARTIAL block before a FULL one"
    assert torch.equal(whole.indices, expected.indices) and whole.indices.dtype == torch.int32
    assert torch.equal(whole.counts, expected.counts) and whole.full_counts is whole.counts
    again = replace(whole, stats=cut.stats)
    assert again.indices is whole.indices and again.full_counts is again.counts


@pytest.mark.parametrize("sink", [0, FRAME_TOKENS])
@pytest.mark.parametrize("text", [0, TEXT])
def test_band_matches_brute_force(sink: int, text: int) -> None:
    band, n = make_band(sink), TOKENS + text
    kept = band.keeps(torch.arange(n)[:, None], torch.arange(n)[None])
    assert torch.equal(kept, brute_band(band, n, n))


@pytest.mark.parametrize("sink", [0, 1, FRAME_TOKENS, TOKENS])
@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 64), (64, 128), (41, 500)])
def test_pairs_per_block_counts_exactly(
    sink: int, block_q: int, block_kv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_accel.kernels.pair_tests._COUNT_CHUNK", 5000)
    band, n = make_band(sink), TOKENS + TEXT
    mask = brute_band(band, n, n)
    wanted = [[int(t.sum()) for t in strip.split(block_kv, 1)] for strip in mask.split(block_q, 0)]
    assert band.pairs_per_block(n, n, block_q, block_kv).tolist() == wanted


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("lead", [(1, 1), (1, 3), (2, 3)])
def test_density_counts_pairs(banded: bool, lead: tuple[int, int]) -> None:
    n = TOKENS + TEXT
    keep = blocks(n, n, 128, 64, *lead)
    band = make_band(FRAME_TOKENS) if banded else None
    partial = keep & blocks(n, n, 128, 64, seed=3) if banded else None
    plan = plan_from_blocks(keep, partial=partial, pair_test=band, q_len=n, kv_len=n, block_q=128, block_kv=64)
    mask = brute_mask(keep, partial, band, (n, n, 128, 64))
    assert torch.equal(plan.element_mask(), mask)
    per_head = mask.double().mean((0, 2, 3)).tolist()
    assert plan.stats.density_per_head == pytest.approx(per_head, abs=1e-12)
    assert plan.density == pytest.approx(mask.double().mean().item(), abs=1e-12)


def test_band_alone_finds_the_blocks_it_cuts() -> None:
    sizes: dict[str, Any] = {"q_len": TOKENS, "kv_len": TOKENS, "block_q": 64, "block_kv": 64}
    everything = torch.ones_like(blocks(TOKENS, TOKENS, 64, 64))
    plan = plan_from_blocks(everything, pair_test=make_band(), **sizes)
    assert torch.equal(plan.element_mask()[0, 0], brute_band(make_band(), TOKENS, TOKENS))
    assert not plan.to_bool().all()
    assert plan.to_bool(full_only=True).any()


def test_element_mask_is_in_the_original_order() -> None:
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5))
    keep = blocks(TOKENS, TOKENS, 128, 128)
    sizes: dict[str, Any] = {"q_len": TOKENS, "kv_len": TOKENS, "block_q": 128, "block_kv": 128}
    plan = plan_from_blocks(keep, order=order, **sizes)
    original = plan.element_mask()[0, 0]
    in_plan = plan_from_blocks(keep, **sizes).element_mask()[0, 0]
    assert torch.equal(original[order][:, order], in_plan)
    assert not torch.equal(original, in_plan)


def test_plan_is_immutable_and_knows_its_size() -> None:
    plan = plan_from_blocks(blocks(256, 256, 64, 64), q_len=256, kv_len=256, block_q=64, block_kv=64)
    with pytest.raises(FrozenInstanceError):
        plan.q_len = 3  # type: ignore[misc]
    # counts doubles as full_counts, so it is held once.
    assert plan.nbytes == 4 * (plan.indices.numel() + plan.counts.numel())
    assert plan.to("meta").nbytes == plan.nbytes
    assert plan.to("cpu") is plan


def test_to_moves_every_tensor() -> None:
    keep = blocks(TOKENS, TOKENS, 64, 64)
    sizes: dict[str, Any] = {"q_len": TOKENS, "kv_len": TOKENS, "block_q": 64, "block_kv": 64}
    plan = plan_from_blocks(keep, partial=keep, pair_test=make_band(), order=torch.arange(TOKENS), **sizes).to("meta")
    assert isinstance(plan.pair_test, Band) and plan.order is not None
    tensors = (plan.indices, plan.counts, plan.full_counts, plan.order, plan.pair_test.widths)
    assert {t.device.type for t in tensors} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": torch.ones(2, 2)}, "bool"),
        ({"keep": torch.ones(3, 2, dtype=torch.bool)}, "need"),
        ({"keep": torch.ones(1, 2, 2, dtype=torch.bool)}, "need"),
        ({"block_q": 0}, "block_q must be at least 1"),
        ({"kv_len": 0}, "kv_len must be at least 1"),
        ({"partial": torch.ones(2, 2, dtype=torch.bool)}, "need a pair test"),
        ({"order": torch.arange(5)}, r"\(256,\)"),
        ({"order": torch.arange(256, dtype=torch.int32)}, "int64"),
        ({"kv_len": 200, "order": torch.arange(256)}, "alike"),
        ({"always_kv": [(0, 300)]}, "not a range"),
        ({"always_q": [(9, 3)]}, "not a range"),
    ],
)
def test_builder_refuses(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"keep": torch.ones(2, 2, dtype=torch.bool), "q_len": 256, "kv_len": 256}
    good |= {"block_q": 128, "block_kv": 128}
    plan_from_blocks(**good)
    with pytest.raises(ValueError, match=message):
        plan_from_blocks(**(good | change))


def test_builder_refuses_partial_blocks_that_are_not_kept() -> None:
    keep = torch.eye(11, dtype=torch.bool)
    with pytest.raises(ValueError, match="must be a kept block"):
        plan_from_blocks(
            keep, partial=~keep, pair_test=make_band(), q_len=TOKENS, kv_len=TOKENS, block_q=128, block_kv=128
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.zeros(1, 1, 3, 2, dtype=torch.int32)}, "need"),
        ({"indices": torch.zeros(1, 1, 2, 2)}, "int32"),
        ({"counts": torch.zeros(1, 2, 2, dtype=torch.int32)}, "counts has shape"),
        ({"full_counts": torch.zeros(1, 1, 2, dtype=torch.int64)}, "full_counts must be int32"),
        ({"counts": torch.zeros(1, 1, 2, dtype=torch.int32, device="meta")}, "counts is on meta"),
    ],
)
def test_plan_refuses_bad_lists(change: dict[str, Any], message: str) -> None:
    keep = torch.ones(2, 2, dtype=torch.bool)
    plan = plan_from_blocks(keep, q_len=256, kv_len=256, block_q=128, block_kv=128)
    with pytest.raises(ValueError, match=message):
        replace(plan, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_tokens": 0}, "frame_tokens"),
        ({"widths": torch.zeros(3)}, "int32"),
        ({"widths": torch.zeros(0, dtype=torch.int32)}, "non-empty"),
        ({"video_len": 31}, "hold 30"),
        ({"sink_tokens": -1}, "negative"),
    ],
)
def test_band_refuses(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"frame_tokens": 10, "widths": torch.zeros(3, dtype=torch.int32), "video_len": 30}
    Band(**good)
    with pytest.raises(ValueError, match=message):
        Band(**(good | change))


def test_plan_must_share_one_device() -> None:
    counts = torch.ones(1, 1, 2, dtype=torch.int32, device="meta")
    band = make_band()
    with pytest.raises(ValueError, match="The pair test is on cpu"):
        SparsePlan(
            256,
            256,
            128,
            128,
            torch.zeros(1, 1, 2, 1, dtype=torch.int32, device="meta"),
            counts,
            counts,
            PlanStats(1.0, (1.0,)),
            pair_test=band,
        )
