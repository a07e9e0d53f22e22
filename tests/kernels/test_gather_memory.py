"""The gather backend holds a bounded amount of gathered blocks, however many rows list equally many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.bitmap import Bitmap
from dit_accel.kernels.gather import backward, forward
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

from .costs import peak_bytes

HEADS, TOKENS, DIM, BLOCK = 4, 2048, 32, 64
KEPT = 16
# Gathered keys and values of all rows at once, in float32: what an unbounded bucket would hold.
ALL_GATHERED = HEADS * (TOKENS // BLOCK) * KEPT * BLOCK * DIM * 4 * 2
# One copy of q, k, v, out each, and as many float32 gradients.
COPIES = 8 * HEADS * TOKENS * DIM * 4
CHUNK = 1 << 20


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the size of chunks, at first to `CHUNK`."""

    def resize(size: int) -> None:
        monkeypatch.setitem(forward._CHUNK_BYTES, "cpu", size)
        monkeypatch.setitem(backward._STACK_BYTES, "cpu", size)

    resize(CHUNK)
    return resize


def make_plan(cut: bool) -> SparsePlan:
    """Every row of every head lists `KEPT` blocks; with `cut` one bit is missing in each of them."""
    side = TOKENS // BLOCK
    keep = torch.zeros(side, side, dtype=torch.bool)
    keep[:, ::2] = True
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[::BLOCK, ::BLOCK] = False
    test = Bitmap.from_mask(mask, block_q=BLOCK, block_kv=BLOCK) if cut else None
    return plan_from_blocks(keep, q_len=TOKENS, kv_len=TOKENS, block_q=BLOCK, block_kv=BLOCK, pair_test=test)


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, TOKENS, DIM, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("cut", [False, True])
def test_forward(cut: bool) -> None:
    plan, (q, k, v) = make_plan(cut), tensors()
    allowed = COPIES + torch.get_num_threads() * 3 * CHUNK
    assert allowed < ALL_GATHERED / 2
    assert peak_bytes(lambda: attend(q, k, v, plan, backend="gather")) < allowed


def test_without_chunks_the_bucket_would_fill_memory(chunks: Callable[[int], None]) -> None:
    chunks(1 << 30)
    plan, (q, k, v) = make_plan(False), tensors()
    assert peak_bytes(lambda: attend(q, k, v, plan, backend="gather")) > ALL_GATHERED


@pytest.mark.parametrize("cut", [False, True])
def test_backward(cut: bool) -> None:
    plan, (q, k, v) = make_plan(cut), (t.requires_grad_() for t in tensors())
    out = attend(q, k, v, plan, backend="gather")
    # A single row is never cut: scores, weights, their gradients and a temporary, and its blocks in float32.
    row = BLOCK * KEPT * BLOCK * 4 * 5 + 4 * KEPT * BLOCK * DIM * 4
    allowed = 2 * COPIES + 4 * max(CHUNK, row)
    assert allowed < ALL_GATHERED
    assert peak_bytes(lambda: torch.autograd.grad(out.sum(), (q, k, v))) < allowed


def test_rows_are_neither_lost_nor_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    dense = forward.dense_attention

    def counted(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append(q.shape[0])
        return dense(q, *rest)

    monkeypatch.setattr(forward, "dense_attention", counted)
    q, k, v = tensors()
    attend(q, k, v, make_plan(False), backend="gather")
    gathered = KEPT * BLOCK * DIM * 4 * 2
    assert sum(calls) == HEADS * TOKENS // BLOCK
    assert max(calls) <= max(1, torch.get_num_threads() * CHUNK // gathered)
