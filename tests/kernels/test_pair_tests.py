"""Pair tests against brute force from their formulas, and every backend under each of them."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels import bitmap, pair_tests
from dit_accel.kernels.bitmap import Bitmap
from dit_accel.kernels.pair_tests import Band, Neighborhood, PairTest, blocks_of, decode, encode
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

from .costs import peak_bytes
from .interpreter_runner import interpreted
from .pair_test_cases import CASES, DTYPES, PLANS, check, random_bitmap

Shape = tuple[int, ...]


def along(length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """The mask of one dimension, key by key: the formula of generalized neighborhood attention (arXiv 2504.16922)."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i % dilation, length, dilation):
            own, other = i // dilation, j // dilation
            size = length // dilation + (1 if i % dilation < length % dilation else 0)
            if causal:
                leader = min(own // stride * stride + stride - 1, size - 1)
                mask[i, j] = other <= own and leader - other < window
            else:
                leader = min(own // stride * stride + stride // 2, size - 1)
                start = sorted((0, leader - window // 2, size - window))[1]
                mask[i, j] = start <= other < start + window
    return mask


def over_grid(
    grid: Shape, window: Shape, stride: Shape, dilation: Shape, causal: tuple[bool, ...], text: int
) -> Tensor:
    """Mask of all dimensions in raster order, text behind."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for numbers in zip(grid, window, stride, dilation, causal, strict=True):
        mask = torch.kron(mask.int(), along(*numbers).int()).bool()
    return torch.nn.functional.pad(mask, (0, text, 0, text), value=True)


def random_settings(seed: int) -> dict[str, Any]:
    """A random grid of up to about 400 tokens, and parameters that fit it."""
    rng = random.Random(seed)
    dims = 1 + seed % 3
    most = (200, 18, 8)[dims - 1]
    grid = tuple(rng.randint(1, most) for _ in range(dims))
    dilation = tuple(rng.randint(1, min(3, n)) for n in grid)
    window = tuple(rng.choice([rng.randint(1, n // d), n // d]) for n, d in zip(grid, dilation, strict=True))
    stride = tuple(rng.choice([1, rng.randint(1, w), w]) for w in window)
    causal = tuple(rng.random() < 0.3 for _ in grid)
    return {"grid": grid, "window": window, "stride": stride, "dilation": dilation, "causal": causal}


def per_block(mask: Tensor, block_q: int, block_kv: int) -> list[list[int]]:
    """Pairs of each block, by cutting and counting."""
    return [[int(t.sum()) for t in strip.split(block_kv, 1)] for strip in mask.split(block_q, 0)]


def positions(length: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(length)
    return index[:, None], index[None]


@pytest.mark.parametrize("seed", range(75))
def test_neighborhood_is_the_formula(seed: int) -> None:
    settings, text = random_settings(seed), (0, 9)[seed % 2]
    test = Neighborhood.of(**settings)
    mask = over_grid(**settings, text=text)
    assert torch.equal(test.keeps(*positions(len(mask))), mask)
    if not any(settings["causal"]):
        grid = test.video_len
        assert mask[:grid, :grid].sum(1).eq(math.prod(settings["window"])).all()


@pytest.mark.parametrize("seed", range(60))
def test_neighborhood_counts_blocks_exactly(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_tests, "_COUNT_CHUNK", 10_000)
    settings, text = random_settings(seed), (0, 9, 40)[seed // 3 % 3]
    block_q, block_kv = [(16, 16), (64, 16), (7, 30)][seed // 5 % 3]
    mask = over_grid(**settings, text=text)
    raster = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed)) if seed % 2 else None
    test = Neighborhood.of(**settings, raster=raster)
    if raster is not None:
        mask = mask[raster][:, raster]
    sizes = (len(mask), len(mask), block_q, block_kv)
    assert torch.equal(test.keeps(*positions(len(mask))), mask)
    counts = per_block(mask, block_q, block_kv)
    assert test.pairs_per_block(*sizes).tolist() == counts
    few = min(11, len(mask))
    assert test.pairs_per_block(few, len(mask), 4, block_kv).tolist() == per_block(mask[:few], 4, block_kv)
    full, partial = blocks_of(test, *sizes)
    dropped = per_block(~mask, block_q, block_kv)
    assert full.tolist() == [[not n for n in row] for row in dropped]
    assert (full | partial).tolist() == [[n > 0 for n in row] for row in counts]
    assert not (full & partial).any()


def test_windows_by_hand() -> None:
    def kept(query: int, **settings: Any) -> list[int]:
        test = Neighborhood.of((10,), **settings)
        return test.keeps(torch.tensor([[query]]), torch.arange(10)).nonzero()[:, 1].tolist()

    assert kept(5, window=3) == [4, 5, 6]
    assert kept(5, window=4) == [3, 4, 5, 6]
    assert kept(0, window=3) == [0, 1, 2] and kept(9, window=4) == [6, 7, 8, 9]
    assert kept(3, window=5, stride=5) == kept(0, window=5, stride=5) == [0, 1, 2, 3, 4]
    assert kept(4, window=2, dilation=3) == [1, 4]
    assert kept(5, window=3, causal=True) == [3, 4, 5] and kept(1, window=3, causal=True) == [0, 1]
    assert kept(4, window=3, stride=2, causal=True) == [3, 4]


def test_tiles_on_aligned_strides_cut_no_block() -> None:
    """Perfectly block-sparse: tokens in tile order, windows and strides multiples of the tile."""
    frames, height, width = 4, 8, 8
    tiles = torch.arange(frames * height * width).view(frames // 2, 2, height // 4, 4, width // 4, 4)
    order = tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1)
    test = Neighborhood.of((frames, height, width), (2, 4, 4), stride=(2, 4, 4), raster=order)
    full, partial = blocks_of(test, len(order), len(order), 32, 32)
    assert torch.equal(full, torch.eye(8, dtype=torch.bool)) and not partial.any()


@pytest.mark.parametrize("reordered", [False, True])
def test_a_plan_shows_the_test_the_tokens_of_its_order(reordered: bool) -> None:
    test, length = Neighborhood.of((4, 5, 6), (3, 3, 3)), 131
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)) if reordered else None
    keep = torch.ones(5, 5, dtype=torch.bool)
    plan = plan_from_blocks(keep, pair_test=test, order=order, q_len=length, kv_len=length, block_q=32, block_kv=32)
    assert torch.equal(plan.element_mask()[0, 0], test.keeps(*positions(length)))
    assert plan.density == pytest.approx(test.keeps(*positions(length)).double().mean().item())


@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize(("block_q", "block_kv"), [(16, 64), (32, 37), (5, 3)])
def test_bitmap_says_what_the_mask_says(lead: tuple[int, int], block_q: int, block_kv: int) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(*lead, 70, 131, generator=generator) < 0.5
    mask[..., :block_q, :block_kv] = True
    mask[..., -block_q:, :] = False
    test = Bitmap.from_mask(mask, block_q=block_q, block_kv=block_kv)
    index = torch.arange(70)[:, None], torch.arange(131)
    assert torch.equal(test.keeps(*index), mask)
    assert torch.equal(test.keeps_in(lead[0] - 1, lead[1] - 1, *index), mask[-1, -1])
    counts = [[per_block(m, block_q, block_kv) for m in item] for item in mask]
    assert test.pairs_per_block(70, 131, block_q, block_kv).tolist() == counts
    full, partial = blocks_of(test, 70, 131, block_q, block_kv)
    assert full[..., 0, 0].all() and not (full | partial)[..., -1, :].any() and partial[..., 0, 1].all()
    keep = torch.ones(full.shape[-2:], dtype=torch.bool)
    plan = plan_from_blocks(keep, pair_test=test, q_len=70, kv_len=131, block_q=block_q, block_kv=block_kv)
    assert torch.equal(plan.element_mask(), mask)
    assert plan.density == pytest.approx(mask.double().mean().item())
    assert plan.stats.density_per_head == pytest.approx(mask.double().mean((0, 2, 3)).tolist())


def test_bits_of_any_word_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (1000,), generator=generator).tolist()
    words = [0, 1, -1, -(2**31), 2**31 - 1, 0x55555555, -0x55555556, *drawn]
    counts = bitmap._bit_counts(torch.tensor(words, dtype=torch.int32))
    assert counts.tolist() == [bin(word & 0xFFFFFFFF).count("1") for word in words]


def test_counting_pairs_takes_less_memory_than_the_bitmap(monkeypatch: pytest.MonkeyPatch) -> None:
    side, block = 64, 64
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (side * side, block, 2), generator=generator).to(torch.int32)
    slots = torch.arange(side * side, dtype=torch.int32).view(1, 1, side, side)
    test, sizes = Bitmap(slots, words, block), (side * block - 5, side * block - 7, block, block)
    expected = test.pairs_per_block(*sizes)
    monkeypatch.setitem(bitmap._COUNT_WORDS, "cpu", 1 << 12)
    assert torch.equal(test.pairs_per_block(*sizes), expected)
    assert peak_bytes(lambda: test.pairs_per_block(*sizes)) < words.nbytes / 2


TESTS: tuple[PairTest | None, ...] = (
    None,
    Band(30, torch.tensor([9, 2], dtype=torch.int32), 50, 3),
    Neighborhood.of((9, 10), (3, 4), dilation=(1, 2)),
    Neighborhood.of((90,), 7, raster=torch.arange(90).flip(0)),
    random_bitmap((1, 2), 90, 90, 16, 32),
)


@pytest.mark.parametrize("test", TESTS)
def test_encoding_goes_both_ways(test: PairTest | None) -> None:
    kind, table, lookup, numbers = encode(test)
    again = decode(kind, table, lookup, numbers)
    assert type(again) is type(test)
    if test is not None and again is not None:
        assert torch.equal(again.keeps(*positions(90)), test.keeps(*positions(90)))
        assert again.tensors() == test.tensors()
        assert {t.device.type for t in test.to("meta").tensors()} == {"meta"}
    assert len({encode(t).kind for t in TESTS}) == len(TESTS)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("make", PLANS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_backends(make: Any, dtype: str, backend: str) -> None:
    # torch's fused CPU kernel adds up float16 weights in float16 products, which its log-sum-exp shows.
    rounded = backend == "gather" and dtype == "float16"
    check(make(), backend, DTYPES[dtype], lse_tolerance=1e-4 if rounded else 1e-5)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Results of pair_test_cases.py."""
    pytest.importorskip("triton")
    return interpreted("pair_test_cases")


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_interpreted_kernels(case: str, results: dict[str, str]) -> None:
    assert results[case] == "ok", results[case]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": (4, 4, 4, 4)}, "1 to 3 numbers"),
        ({"grid": (0, 4)}, "1 to 3 numbers"),
        ({"window": (3, 3, 3)}, "window has 3 entries"),
        ({"window": 9}, "does not fit a dimension of 8"),
        ({"window": 5, "dilation": 2}, "window 5 with dilation 2"),
        ({"window": 0}, "at least 1"),
        ({"stride": 4}, "stride 4 must lie between 1 and the window, 3"),
        ({"raster": torch.zeros(2, 2)}, "int32 vector"),
    ],
)
def test_neighborhood_refuses(settings: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"grid": (8, 9), "window": 3}
    Neighborhood.of(**good)
    with pytest.raises(ValueError, match=message):
        Neighborhood.of(**(good | settings))


def test_neighborhood_refuses_tables_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="ranges must be int32 of shape"):
        Neighborhood((1, 2, 3), (1, 1, 1), torch.zeros(5, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="three numbers"):
        Neighborhood((1, 2, 3), (1, 0, 1), torch.zeros(6, 2, dtype=torch.int32))
    short = Neighborhood.of((100,), 5, raster=torch.arange(90))
    with pytest.raises(ValueError, match="names 90 positions, the plan has 100"):
        cut(short, 100)


def cut(test: PairTest, length: int, *lead: int) -> SparsePlan:
    keep = torch.ones(*lead, -(-length // 16), -(-length // 32), dtype=torch.bool)
    return plan_from_blocks(keep, pair_test=test, q_len=length, kv_len=length, block_q=16, block_kv=32)


def test_bitmap_refuses_plans_of_other_sizes() -> None:
    test = random_bitmap((1, 3), 90, 90, 16, 32)
    assert cut(test, 90).counts.shape[:2] == (1, 3)
    with pytest.raises(ValueError, match=r"bitmap is for \(6, 3\) blocks of 16 x 32, the plan"):
        cut(test, 130)
    with pytest.raises(ValueError, match=r"bitmap is for \(1, 3\) batch items and heads, the lists are for \(1, 2\)"):
        cut(test, 90, 1, 2)
    with pytest.raises(ValueError, match="words has 1 words per query; block_kv=33 keys take 2"):
        Bitmap(test.slots, test.words, 33)
    with pytest.raises(ValueError, match=r"slots must be a non-empty int32 tensor of 4"):
        Bitmap(test.slots.long(), test.words, 32)
    with pytest.raises(ValueError, match="An element mask is"):
        Bitmap.from_mask(torch.ones(4, 4), block_q=2, block_kv=2)
