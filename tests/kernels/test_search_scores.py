"""Block mass and pooled scores against definitions written out over all pairs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.search.mass import block_mass
from dit_accel.kernels.search.pooled import block_means, pooled_scores, sub_block_scores
from dit_accel.kernels.sparse_plan import plan_from_blocks

SHAPES = [(256, 256, 64, 64), (203, 150, 64, 32), (100, 333, 48, 37), (1, 70, 64, 64), (70, 1, 16, 16)]


def tensors(q_len: int, kv_len: int, *, batch: int = 3, heads: int = 2, dim: int = 16, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_len, heads, dim, generator=generator)
    k = torch.randn(batch, heads, kv_len, dim, generator=generator).transpose(1, 2)
    return q, k


def all_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale


def over_blocks(x: Tensor, block_q: int, block_kv: int, reduce: Any) -> Tensor:
    """Applies `reduce` to each block of `[..., q, kv]`, block by block."""
    strips = [[reduce(block) for block in strip.split(block_kv, -1)] for strip in x.split(block_q, -2)]
    return torch.stack([torch.stack(strip, -1) for strip in strips], -2)


@pytest.mark.parametrize("strip", [1, 1 << 22])
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize(("q_len", "kv_len", "block_q", "block_kv"), SHAPES)
def test_block_mass(
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    scale: float | None,
    strip: int,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dit_accel.kernels.search.mass._STRIP", strip)
    q, k = tensors(q_len, kv_len)
    scores = all_scores(q, k, 16**-0.5 if scale is None else scale)
    wanted = over_blocks(scores.softmax(-1), block_q, block_kv, lambda x: x.sum((-1, -2)))
    sizes: dict[str, Any] = {"block_q": block_q, "block_kv": block_kv, "scale": scale}
    mass, lse = block_mass(q, k, return_lse=True, **sizes)
    torch.testing.assert_close(mass.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block_mass(q, k, lse=lse, **sizes), mass, rtol=1e-6, atol=1e-6)


def test_mass_is_counted_with_the_given_lse() -> None:
    q, k = tensors(100, 90)
    mass, lse = block_mass(q, k, block_q=32, block_kv=32, return_lse=True)
    torch.testing.assert_close(block_mass(q, k, block_q=32, block_kv=32, lse=lse + 1), mass * torch.e**-1)
    lse[:, 1, :32] = float("-inf")
    dropped = block_mass(q, k, block_q=32, block_kv=32, lse=lse)
    assert not dropped[:, 1, 0].any()
    assert torch.equal(dropped[:, 0], mass[:, 0])


def test_lse_of_attend_serves_as_cache() -> None:
    q, k = tensors(100, 90)
    plan = plan_from_blocks(torch.ones(4, 3, dtype=torch.bool), q_len=100, kv_len=90, block_q=32, block_kv=32)
    turned = (q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2))
    _, lse = attend(*turned, plan, return_lse=True)
    mass = block_mass(q, k, block_q=32, block_kv=32)
    torch.testing.assert_close(block_mass(q, k, block_q=32, block_kv=32, lse=lse), mass, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in tensors(100, 90))
    sizes: dict[str, Any] = {"block_q": 32, "block_kv": 16}
    for search in (block_mass, pooled_scores):
        torch.testing.assert_close(search(q, k, **sizes), search(q.float(), k.float(), **sizes), rtol=1e-5, atol=1e-5)
    fine = sub_block_scores(q, k, **sizes, stride=8)
    torch.testing.assert_close(fine, sub_block_scores(q.float(), k.float(), **sizes, stride=8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("q_len", "kv_len", "block_q", "block_kv"), SHAPES)
def test_pooled_score_is_the_mean_score_of_a_block(q_len: int, kv_len: int, block_q: int, block_kv: int) -> None:
    q, k = tensors(q_len, kv_len)
    wanted = over_blocks(all_scores(q, k, 0.7), block_q, block_kv, lambda x: x.mean((-1, -2)))
    scores = pooled_scores(q, k, block_q=block_q, block_kv=block_kv, scale=0.7)
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 37, 203, 500])
def test_means_are_over_real_tokens(block: int) -> None:
    x, _ = tensors(203, 1)
    wanted = torch.stack([part.double().mean(1) for part in x.split(block, 1)], 2)
    torch.testing.assert_close(block_means(x, block).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strip", [1, 1 << 20])
@pytest.mark.parametrize("stride", [1, 4, 16])
@pytest.mark.parametrize(("q_len", "kv_len"), [(203, 150), (96, 64), (3, 1)])
def test_sub_block_score(
    q_len: int, kv_len: int, stride: int, strip: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_accel.kernels.search.pooled._STRIP", {"cpu": strip})
    q, k = tensors(q_len, kv_len)
    fine = over_blocks(
        all_scores(q, k, 0.9), stride, stride, lambda x: x.mean((-1, -2)) + torch.tensor(x[0, 0].numel()).log()
    )
    wanted = over_blocks(fine, 32 // stride, 16 // stride, lambda x: x.logsumexp((-1, -2)))
    scores = sub_block_scores(q, k, block_q=32, block_kv=16, stride=stride, scale=0.9)
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-5)


def test_finer_sub_blocks_approach_the_log_sum_of_exponentials_from_below() -> None:
    q, k = tensors(203, 150)
    exact = over_blocks(all_scores(q, k, 1.0), 64, 32, lambda x: x.logsumexp((-1, -2)))
    levels = [sub_block_scores(q, k, block_q=64, block_kv=32, stride=s, scale=1.0).double() for s in (32, 16, 8, 2, 1)]
    for coarse, fine in pairwise(levels):
        assert (coarse <= fine + 1e-5).all()
        assert coarse.mean() < fine.mean() - 0.01
    torch.testing.assert_close(levels[-1], exact, rtol=1e-5, atol=1e-5)


def test_sub_blocks_see_what_means_miss() -> None:
    q, k = torch.ones(1, 64, 1, 16), torch.zeros(1, 128, 1, 16)
    k[:, 64:80], k[:, 80:96] = 3.0, -3.0  # the second block holds strong keys that its mean hides
    pooled = pooled_scores(q, k, block_q=64, block_kv=64)[0, 0, 0]
    assert pooled[0] == pooled[1] == 0
    fine = sub_block_scores(q, k, block_q=64, block_kv=64, stride=16)[0, 0, 0]
    assert fine[1] > fine[0] + 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 64, 16)}, "q must be"),
        ({"k": torch.zeros(2, 0, 3, 16)}, "k must be"),
        ({"q": torch.zeros(2, 64, 3, 16, dtype=torch.float64)}, "float64"),
        ({"k": torch.zeros(2, 64, 3, 16, dtype=torch.float16)}, "Make them the same"),
        ({"k": torch.zeros(2, 64, 1, 16)}, "repeat key heads"),
        ({"block_q": 0}, "block_q must be at least 1"),
        ({"block_kv": -1}, "block_kv must be at least 1"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"backend": "cuda"}, "Unknown search backend"),
        ({"backend": "triton"}, "cannot run this call"),
    ],
)
@pytest.mark.parametrize("search", [block_mass, pooled_scores])
def test_searches_refuse(search: Any, change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"q": torch.zeros(2, 64, 3, 16), "k": torch.zeros(2, 64, 3, 16)}
    good |= {"block_q": 32, "block_kv": 32}
    search(**good)
    with pytest.raises(ValueError, match=message):
        search(**(good | change))


@pytest.mark.parametrize("lse", [torch.zeros(1, 64, 2), torch.zeros(1, 2, 64, dtype=torch.float16)])
def test_mass_refuses_a_wrong_lse(lse: Tensor) -> None:
    q = torch.zeros(1, 64, 2, 16)
    with pytest.raises(ValueError, match=r"lse must be float32 of shape \(1, 2, 64\)"):
        block_mass(q, q, block_q=32, block_kv=32, lse=lse)


@pytest.mark.parametrize(("stride", "message"), [(0, "at least 1"), (24, "must divide"), (32, "must divide")])
def test_sub_blocks_refuse_a_wrong_stride(stride: int, message: str) -> None:
    q = torch.zeros(1, 64, 2, 16)
    with pytest.raises(ValueError, match=message):
        sub_block_scores(q, q, block_q=32, block_kv=16, stride=stride)
