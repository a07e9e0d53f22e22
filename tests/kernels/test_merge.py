"""Attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.merge import merge_attention
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

TOKENS, BLOCK = 333, 32
Part = tuple[Tensor, Tensor]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Part:
    """Plain attention over all keys, with log-sum-exp."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def tensors(batch: int = 3, heads: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    q, k, v = (torch.randn(batch, TOKENS, heads, 24, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    return q, k, v


def owners(parts: int, lead: tuple[int, int]) -> Tensor:
    """Which part holds a block: `[B|1, H|1, NQ, NK]`, -1 for none; the second row of blocks is empty."""
    blocks = -(-TOKENS // BLOCK)
    owner = torch.randint(-1, parts, (*lead, blocks, blocks), generator=torch.Generator().manual_seed(5))
    owner[..., 1, :] = -1
    owner[..., 2, :] = 0  # all keys in one part, so the others are empty here
    return owner


def make_plan(keep: Tensor, band: Band | None = None) -> SparsePlan:
    return plan_from_blocks(keep, q_len=TOKENS, kv_len=TOKENS, block_q=BLOCK, block_kv=BLOCK, pair_test=band)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("lead", [(1, 1), (3, 2)])
@pytest.mark.parametrize("banded", [False, True])
def test_parts_of_a_plan(backend: str, parts: int, lead: tuple[int, int], banded: bool) -> None:
    widths = torch.tensor([60, 20, 7, -1, 0, 3], dtype=torch.int32)
    band = Band(60, widths, 320, 25) if banded else None
    q, k, v = tensors()
    owner = owners(parts, lead)
    pieces = [attend(q, k, v, make_plan(owner == i, band), return_lse=True, backend=backend) for i in range(parts)]
    out, lse = merge_attention([o for o, _ in pieces], [s for _, s in pieces])
    whole = attend(q, k, v, make_plan(owner >= 0, band), return_lse=True, backend="reference")
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)
    assert out[:, :, BLOCK : 2 * BLOCK].eq(0).all() and lse[:, :, BLOCK : 2 * BLOCK].isneginf().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_low_precision_stays_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = tensors(dtype=dtype)
    owner = owners(2, (1, 1))
    pieces = [attend(q, k, v, make_plan(owner == i), return_lse=True) for i in range(2)]
    out, lse = merge_attention([o for o, _ in pieces], [s for _, s in pieces])
    expected, expected_lse = attend(q, k, v, make_plan(owner >= 0), return_lse=True, backend="reference")
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
    mixed, _ = merge_attention([pieces[0][0].float(), pieces[1][0]], [s for _, s in pieces])
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_scores_far_from_zero(shift: float) -> None:
    outputs = [torch.ones(1, 1, 4, 2), 3 * torch.ones(1, 1, 4, 2)]
    lses = [torch.full((1, 1, 4), shift), torch.tensor([[[shift, shift - 1e3, shift + 1e3, float("-inf")]]])]
    out, lse = merge_attention(outputs, lses)
    assert torch.equal(out[0, 0, :, 0], torch.tensor([2.0, 1.0, 3.0, 1.0]))
    top = torch.tensor([shift + 0.6931472, shift, shift + 1e3, shift])
    torch.testing.assert_close(lse[0, 0], top, rtol=0, atol=1e-3)


def test_batch_and_heads_broadcast() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(*lead, 7, 4, generator=generator) for lead in ((3, 1), (1, 2), (1, 1))]
    lses = [torch.randn(*lead, 7, generator=generator) for lead in ((3, 1), (1, 2), (1, 1))]
    out, lse = merge_attention(outputs, lses)
    wide = merge_attention([o.expand(3, 2, 7, 4) for o in outputs], [s.expand(3, 2, 7) for s in lses])
    assert out.shape == (3, 2, 7, 4) and lse.shape == (3, 2, 7)
    assert torch.equal(out, wide[0]) and torch.equal(lse, wide[1])


def test_output_of_an_empty_part_is_not_read() -> None:
    outputs = [torch.ones(1, 1, 2, 3), torch.full((1, 1, 2, 3), float("nan"))]
    outputs = [o.requires_grad_() for o in outputs]
    lses = [torch.tensor([[[1.0, float("-inf")]]]), torch.full((1, 1, 2), float("-inf"))]
    lses = [s.requires_grad_() for s in lses]
    out, lse = merge_attention(outputs, lses)
    assert torch.equal(out[0, 0], torch.tensor([[1.0] * 3, [0.0] * 3]))
    assert lse.flatten().tolist() == [1.0, float("-inf")]
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    gradients = [t.grad for t in (*outputs, *lses) if t.grad is not None]
    assert len(gradients) == 4 and all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].tolist() == [[[[1.0] * 3, [0.0] * 3]]]
    assert gradients[2].flatten().tolist() == [1.0, 0.0]


def test_gradients_of_the_merge() -> None:
    generator = torch.Generator().manual_seed(2)
    outputs = [torch.randn(2, 1, 3, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    lses = [torch.randn(2, 1, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]

    def merged(*parts: Tensor) -> Part:
        return merge_attention(parts[:3], parts[3:])

    assert torch.autograd.gradcheck(merged, (*outputs, *lses))


def test_gradients_reach_q_k_and_v_as_in_dense_attention() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (t.double().requires_grad_() for t in torch.randn(3, 2, 2, 9, 4, generator=generator))
    pieces = [dense(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 4), slice(4, 9))]
    upstream = torch.randn(2, 2, 9, 4, dtype=torch.float64, generator=generator)
    out, lse = merge_attention([o for o, _ in pieces], [s for _, s in pieces])
    got = torch.autograd.grad((out * upstream).sum() + lse.square().sum(), (q, k, v))
    out, lse = dense(q, k, v)
    wanted = torch.autograd.grad((out * upstream).sum() + lse.square().sum(), (q, k, v))
    for gradient, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts", [2, 3])
def test_gradients_through_the_attention_operator(parts: int) -> None:
    owner = owners(parts, (1, 2))
    q, k, v = (t.clone().requires_grad_() for t in tensors())
    pieces = [attend(q, k, v, make_plan(owner == i), return_lse=True, backend="gather") for i in range(parts)]
    merged = merge_attention([o for o, _ in pieces], [s for _, s in pieces])
    whole = attend(q, k, v, make_plan(owner >= 0), return_lse=True, backend="reference")
    got, wanted = (
        torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), (q, k, v)) for out, lse in (merged, whole)
    )
    for gradient, expected in zip(got, wanted, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def good() -> tuple[list[Tensor], list[Tensor]]:
    return [torch.zeros(1, 2, 5, 4), torch.zeros(3, 1, 5, 4)], [torch.zeros(1, 2, 5), torch.zeros(3, 1, 5)]


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        ((0, 1), None, "two or more outputs"),
        ((1, 1), None, "2 outputs and 1 lses"),
        ((0, 0), torch.zeros(2, 5, 4), "Part 0 has an output"),
        ((0, 1), torch.zeros(3, 1, 5, 3), "Part 1 has an output"),
        ((1, 1), torch.zeros(3, 1, 1), "Part 1 has an output"),
        ((1, 0), torch.zeros(1, 2, 5, dtype=torch.int64), "floating point"),
        ((1, 1), torch.zeros(3, 1, 5, device="meta"), "one device"),
        ((0, 1), torch.zeros(3, 4, 5, 4), "different sizes of heads: .2, 4"),
        ((1, 0), torch.zeros(2, 2, 5), "different sizes of batch: .2, 3"),
    ],
)
def test_parts_that_do_not_fit(place: tuple[int, int], tensor: Tensor | None, message: str) -> None:
    parts = good()
    merge_attention(*parts)
    if tensor is None:
        del parts[place[0]][place[1]]
    else:
        parts[place[0]][place[1]] = tensor
    with pytest.raises(ValueError, match=message):
        merge_attention(*parts)


def test_parts_on_two_devices() -> None:
    outputs, lses = good()
    with pytest.raises(ValueError, match=r"on \['cpu', 'meta'\]"):
        merge_attention([outputs[0], outputs[1].to("meta")], [lses[0], lses[1].to("meta")])
