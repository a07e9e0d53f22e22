"""Recall and error of a plan equal those from its element mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.inspect import compare, statistics
from dit_accel.inspect.compare import dense_attention, quality, relative_error
from dit_accel.kernels.search.plan import count_density
from dit_accel.kernels.sparse_plan import plan_from_blocks

from .oracle import softmax


def random_plan(tokens, block, heads, generator, order):
    blocks = -(-tokens // block)
    keep = torch.rand(1, heads, blocks, blocks, generator=generator) < 0.5
    keep |= torch.eye(blocks, dtype=torch.bool)
    order = torch.randperm(tokens, generator=generator) if order else None
    return plan_from_blocks(keep, q_len=tokens, kv_len=tokens, block_q=block, block_kv=block, order=order)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 6), st.booleans(), st.integers(0, 999))
def test_quality_equals_that_of_the_masked_matrix(batch, heads, tokens, block, order, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(batch, heads, tokens, 8, generator=generator) for _ in range(3))
    plan = random_plan(tokens, block, heads, generator, order)
    found = quality(query, key, value, count_density(plan), dense_attention(query, key, value))
    mask = plan.element_mask().expand(batch, heads, -1, -1)
    weights = softmax(query, key)
    kept = torch.where(mask, weights, 0)
    dense, sparse = weights @ value.double(), kept / kept.sum(-1, keepdim=True) @ value.double()
    for head in range(heads):
        recall = float(kept[:, head].sum(-1).mean())
        error = float((sparse - dense)[:, head].norm() / dense[:, head].norm())
        assert float(found.recall[head]) == pytest.approx(recall, abs=1e-5)
        assert float(found.error[head]) == pytest.approx(error, abs=1e-4)
        assert float(found.density[head]) == pytest.approx(float(mask[0, head].double().mean()), abs=1e-6)


def test_compensation_counts_in_the_error_and_not_in_the_recall():
    """Keys that are alike within blocks are stood for by their means exactly."""
    torch.manual_seed(0)
    query = torch.randn(1, 2, 12, 8)
    key, value = (torch.randn(1, 2, 3, 8).repeat_interleave(4, 2) for _ in range(2))
    keep = torch.eye(3, dtype=torch.bool)
    plan = plan_from_blocks(keep, q_len=12, kv_len=12, block_q=4, block_kv=4)
    dense = dense_attention(query, key, value)
    plain, means = (quality(query, key, value, plan, dense, compensate) for compensate in (False, True))
    assert float(plain.error.min()) > 0.1 and float(means.error.max()) < 1e-5
    assert torch.equal(plain.recall, means.recall) and float(means.recall.max()) < 0.9


def test_dense_attention_in_pieces_is_the_whole(monkeypatch):
    query, key, value = (torch.randn(2, 3, 17, 8) for _ in range(3))
    whole = dense_attention(query, key, value)
    monkeypatch.setattr(compare, "CHUNK", 100)
    pieces = dense_attention(query, key, value)
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    scores = query @ key.transpose(-1, -2) / 8**0.5
    for found in (whole, pieces):
        assert torch.allclose(found.output, stock, atol=1e-5)
        assert torch.allclose(found.lse, scores.logsumexp(-1), atol=1e-5)


def test_heads_in_pieces_are_all_heads(monkeypatch):
    from .oracle import video

    query, key = (torch.randn(1, 5, 24, 8) for _ in range(2))
    whole = statistics.call_statistics(query, key, video((2, 3, 4)), 2)
    monkeypatch.setattr(statistics, "CHUNK", 2 * 24 * 2)  # two heads at a time
    pieces = statistics.call_statistics(query, key, video((2, 3, 4)), 2)
    assert len(list(statistics.measured(query, key, video((2, 3, 4)), 2))) == 3
    assert whole.keys() == pieces.keys() and all(torch.allclose(whole[name], pieces[name]) for name in whole)


def test_the_error_of_nothing_is_nothing():
    nothing = torch.zeros(1, 2, 3, 4)
    assert torch.equal(relative_error(nothing, nothing), torch.zeros(2))
