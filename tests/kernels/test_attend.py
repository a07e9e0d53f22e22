"""Every backend that runs on the CPU gives what dense attention under the expanded mask gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.gather import forward as gather
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

FRAMES, FRAME_TOKENS = 7, 15 * 13
ODD = FRAMES * FRAME_TOKENS
BACKENDS = ("gather", "reference", "auto")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}

Triple = tuple[Tensor, Tensor, Tensor]

pytestmark = pytest.mark.usefixtures("poisoned")


def tensors(batch: int, heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype) -> Triple:
    """Random q, k, v as transposed views of [batch, tokens, heads, dim] storage."""
    generator = torch.Generator().manual_seed(q_len + dim)
    q, k, v = (
        torch.randn(batch, n, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        for n in (q_len, kv_len, kv_len)
    )
    return q, k, v


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention in float64, written without any code of the package."""
    scores = q.double() @ k.double().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return weights @ v.double(), lse


def check(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, backend: str, **options: Any) -> None:
    out, lse = attend(q, k, v, plan, return_lse=True, backend=backend, **options)
    expected, expected_lse = oracle(q, k, v, plan.element_mask(), options.get("scale"))
    tolerance = TOLERANCE[q.dtype]
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5 if q.dtype.itemsize == 4 else 1e-3)
    assert torch.equal(attend(q, k, v, plan, backend=backend, **options), out)


def random_plan(
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    lead: tuple[int, ...] = (1, 1),
    density: float = 0.4,
    **rest: Any,
) -> SparsePlan:
    generator = torch.Generator().manual_seed(7)
    keep = torch.rand(*lead, -(-q_len // block_q), -(-kv_len // block_kv), generator=generator) < density
    return plan_from_blocks(keep, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, **rest)


def make_band(text: int = 0) -> Band:
    widths = torch.tensor([FRAME_TOKENS, 80, 40, 11, 0, -1, 3], dtype=torch.int32)
    return Band(FRAME_TOKENS, widths, ODD - text, 50)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("lead", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_random_lists(backend: str, dtype: torch.dtype, lead: tuple[int, int]) -> None:
    check(*tensors(2, 3, 450, 450, 40, dtype), random_plan(450, 450, 64, 64, lead), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 128), (64, 128), (128, 64), (100, 37)])
def test_odd_length(backend: str, block_q: int, block_kv: int) -> None:
    assert ODD % block_q and ODD % block_kv
    check(*tensors(1, 2, ODD, ODD, 64, torch.float32), random_plan(ODD, ODD, block_q, block_kv, (1, 2)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (5, 700), (700, 5), (256, 512)])
def test_lengths_and_batches(backend: str, batch: int, q_len: int, kv_len: int) -> None:
    plan = random_plan(q_len, kv_len, 128, 64, (1, 2), 0.7)
    check(*tensors(batch, 2, q_len, kv_len, 32, torch.float32), plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [8, 33, 72, 96, 128, 160, 256])
def test_head_dims(backend: str, dim: int) -> None:
    check(*tensors(1, 1, 200, 200, dim, torch.float32), random_plan(200, 200, 64, 64), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [512, 500])
def test_a_full_plan_is_dense_attention(backend: str, length: int) -> None:
    q, k, v = tensors(2, 2, length, length, 64, torch.float32)
    out = attend(q, k, v, random_plan(length, length, 128, 128, density=1.1), backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("banded", [False, True])
def test_rows_without_keys(backend: str, banded: bool) -> None:
    keep = torch.ones(2, 11, 11, dtype=torch.bool)
    keep[0, 3] = False
    keep[1] = False
    band = make_band() if banded else None
    plan = plan_from_blocks(keep[None], q_len=ODD, kv_len=ODD, block_q=128, block_kv=128, pair_test=band)
    q, k, v = tensors(1, 2, ODD, ODD, 32, torch.float32)
    out, lse = attend(q, k, v, plan, return_lse=True, backend=backend)
    assert out[0, 0, 384:512].eq(0).all() and lse[0, 0, 384:512].eq(float("-inf")).all()
    assert out[0, 1].eq(0).all() and lse[0, 1].eq(float("-inf")).all()
    assert lse[0, 0, :384].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("text", [0, 21])
def test_band_against_brute_force(backend: str, lead: tuple[int, int], text: int) -> None:
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(*lead, 11, 22, generator=generator) < 0.7
    partial = keep & (torch.rand(11, 22, generator=generator) < 0.6)
    sizes: dict[str, Any] = {"q_len": ODD, "kv_len": ODD, "block_q": 128, "block_kv": 64}
    plan = plan_from_blocks(keep, partial=partial, pair_test=make_band(text), **sizes)
    check(*tensors(2, 2, ODD, ODD, 16, torch.float32), plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_that_the_band_leaves_without_keys(backend: str) -> None:
    band = Band(100, torch.tensor([-1, 5, -1], dtype=torch.int32), 300)
    keep = torch.eye(3, dtype=torch.bool)
    plan = plan_from_blocks(keep, partial=keep, pair_test=band, q_len=300, kv_len=300, block_q=100, block_kv=100)
    q, k, v = tensors(1, 2, 300, 300, 16, torch.float32)
    out, lse = attend(q, k, v, plan, return_lse=True, backend=backend)
    assert out.eq(0).all() and lse.eq(float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_whose_test_was_taken_off(backend: str) -> None:
    """The short last block was FULL beside a PARTIAL one, so it stood before it."""
    band = Band(50, torch.tensor([50, 5, -1], dtype=torch.int32), 150)
    keep = torch.ones(3, 3, dtype=torch.bool)
    cut = plan_from_blocks(keep, pair_test=band, q_len=150, kv_len=150, block_q=64, block_kv=64)
    assert cut.indices[0, 0, 2, :2].tolist() == [2, 1] and cut.full_counts[0, 0, 2] == 1
    plan = replace(cut, pair_test=None)
    q, k, v = tensors(2, 2, 150, 150, 16, torch.float32)
    check(q, k, v, plan, backend)
    mask = cut.to_bool().repeat_interleave(64, 2).repeat_interleave(64, 3)[..., :150, :150]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v, plan, backend=backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("banded", [False, True])
def test_order_permutes_in_and_back(backend: str, banded: bool) -> None:
    order = torch.randperm(ODD, generator=torch.Generator().manual_seed(1))
    plan = random_plan(ODD, ODD, 128, 128, (1, 2), order=order, pair_test=make_band() if banded else None)
    check(*tensors(1, 2, ODD, ODD, 16, torch.float32), plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    plan = random_plan(300, 300, 64, 64, (1, 3))
    packed = torch.randn(2, 300, 3, 3, 32, generator=torch.Generator().manual_seed(2))
    q, k, v = packed.permute(2, 0, 3, 1, 4)  # one fused projection, split by views
    check(q, k, v, plan, backend)
    check(q.transpose(-1, -2).contiguous().transpose(-1, -2), k.expand_as(k), v, plan, backend)
    check(q[:, :1].expand(-1, 3, -1, -1), k, v, plan, backend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_reads_any_strides_on_a_gpu() -> None:
    plan = random_plan(300, 300, 64, 64, (1, 2)).to("cuda")
    q, k, v = (x.cuda() for x in tensors(1, 2, 300, 300, 64, torch.float16))
    turned = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(attend(turned, k, v, plan), attend(q, k, v, plan))
    with pytest.raises(ValueError, match="cannot run this call"):
        attend(turned, k, v, plan, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.01, 1.7])
def test_scale(backend: str, scale: float) -> None:
    check(*tensors(1, 2, 200, 200, 32, torch.float32), random_plan(200, 200, 64, 64), backend, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_finite(backend: str) -> None:
    q, k, v = tensors(1, 1, 200, 200, 32, torch.float32)
    plan = random_plan(200, 200, 64, 64, density=0.9)
    out, lse = attend(q * 8, k * 8, v, plan, return_lse=True, backend=backend)
    expected, expected_lse = oracle(q * 8, k * 8, v, plan.element_mask())
    # Scores of several hundred: exp of any of them overflows, and float32 holds them to 1e-5 only.
    assert expected_lse.max() > 200
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 200_000])
def test_gather_in_small_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gather._CHUNK_BYTES, "cpu", chunk)
    q, k, v = tensors(2, 2, ODD, ODD, 16, torch.float32)
    check(q, k, v, random_plan(ODD, ODD, 128, 64, (2, 2)), "gather")
    check(q, k, v, random_plan(ODD, ODD, 128, 64, pair_test=make_band()), "gather")


@pytest.mark.parametrize("banded", [False, True])
def test_gather_without_the_fused_cpu_kernel(banded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_has_fused_lse", lambda device: False)
    q, k, v = tensors(2, 2, ODD, ODD, 16, torch.float32)
    check(q, k, v, random_plan(ODD, ODD, 128, 64, (2, 2), pair_test=make_band() if banded else None), "gather")


def test_inputs_are_left_alone() -> None:
    q, k, v = tensors(1, 2, 256, 256, 32, torch.float32)
    copies = [t.clone() for t in (q, k, v)]
    out = attend(q, k, v, random_plan(256, 256, 64, 64))
    out.fill_(0)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))
