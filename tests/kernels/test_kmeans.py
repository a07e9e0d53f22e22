"""K-means against Lloyd's algorithm in plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.kernels.cluster import kmeans as module
from dit_accel.kernels.cluster.kmeans import Clusters, chained, kmeans

from .kmeans_oracle import chain_of, lloyd, start_of


def assert_equal(found: Clusters, b: int, h: int, expected: tuple[list[int], Tensor]) -> None:
    labels, centroids = expected
    assert found.labels[b, h].tolist() == labels
    assert found.sizes[b, h].tolist() == [labels.count(j) for j in range(len(centroids))]
    torch.testing.assert_close(found.centroids[b, h].double(), centroids, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_equals_lloyd(data: Any) -> None:
    """Some examples have repeated tokens, whose centroids coincide: whole numbers and one round, so nothing rounds."""
    batch, heads, tokens = (data.draw(st.integers(1, n)) for n in (3, 2, 23))
    clusters, iterations = data.draw(st.integers(1, tokens)), data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    x = torch.randn(batch, heads, tokens, 3)
    if data.draw(st.booleans()):
        x, iterations = x.round()[:, :, torch.randint(max(1, tokens // 3), (tokens,))], 1
    found = kmeans(x, clusters, iterations)
    for b in range(batch):
        for h in range(heads):
            head = x[b, h].double()
            assert_equal(found, b, h, lloyd(head, start_of(head, clusters), iterations))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 999))
def test_goes_on_from_centroids(clusters: int, iterations: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, start = torch.randn(2, 2, 17, 4), torch.randn(2, 2, clusters, 4)
    found = kmeans(x, start, iterations)
    for b, h in ((0, 0), (1, 1)):
        assert_equal(found, b, h, lloyd(x[b, h].double(), start[b, h].double(), iterations))


def test_repeated_tokens_stay_together() -> None:
    torch.manual_seed(0)
    which = torch.randint(5, (60,))
    labels = kmeans(torch.randn(1, 2, 5, 8)[:, :, which], 12, 20).labels
    for h in range(2):
        assert all(len(labels[0, h, which == token].unique()) == 1 for token in range(5))


def test_an_empty_cluster_keeps_its_centroid() -> None:
    x = torch.zeros(1, 1, 6, 2)
    start = torch.tensor([[[[50.0, 0.0], [1.0, 1.0], [1.0, 1.0]]]])
    found = kmeans(x, start, 3)
    assert found.sizes.tolist() == [[[0, 6, 0]]]
    assert found.centroids.tolist() == [[[[50.0, 0.0], [0.0, 0.0], [1.0, 1.0]]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types_are_averaged_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 400, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = kmeans(x, 4, 3), kmeans(x.float(), 4, 3)
    assert torch.equal(found.labels, expected.labels) and torch.equal(found.centroids, expected.centroids)


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(1)).transpose(2, 3).contiguous()
    expected = kmeans(x.transpose(2, 3), 6, 3)
    monkeypatch.setitem(module._STRIP_BYTES, "cpu", 4 * 6 * 6 * 7)  # 7 tokens
    found = kmeans(x.transpose(2, 3), 6, 3)
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.centroids, expected.centroids)


def test_chain_goes_to_the_nearest_that_is_left() -> None:
    x = torch.randn(2, 2, 60, 3, generator=torch.Generator().manual_seed(2))
    plain = kmeans(x, 9, 2)
    found = chained(plain)
    for b in range(2):
        for h in range(2):
            centers = plain.centroids[b, h]
            chain = chain_of(centers)
            assert torch.equal(found.centroids[b, h], centers[chain])
            assert found.labels[b, h].tolist() == [chain.index(label) for label in plain.labels[b, h].tolist()]
            assert torch.equal(found.sizes[b, h], plain.sizes[b, h, chain])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_chain_holds_every_cluster_once_whatever_tokens_are(value: float) -> None:
    x = torch.randn(1, 2, 40, 4, generator=torch.Generator().manual_seed(0))
    x[0, 1, 3, 0] = value
    plain = kmeans(x, 6, 3)
    found = chained(plain)
    assert torch.equal(found.sizes.sort(-1).values, plain.sizes.sort(-1).values)
    for h in range(2):
        assert [found.labels[0, h].tolist().count(j) for j in range(6)] == found.sizes[0, h].tolist()
    finite = kmeans(x[:, :1], 6, 3)
    assert torch.equal(found.labels[:, :1], chained(finite).labels)  # the other head is as without it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3, 4), 2, 1), r"x must be floating \[batch"),
        ((torch.ones(1, 1, 4, 2).int(), 2, 1), "x must be floating"),
        ((torch.ones(1, 1, 4, 2), 0, 1), "4 tokens make 1 to 4 clusters, not 0"),
        ((torch.ones(1, 1, 4, 2), 5, 1), "not 5"),
        ((torch.ones(1, 1, 4, 2), 2, 0), "iterations must be at least 1"),
        ((torch.ones(1, 1, 4, 2), torch.ones(1, 1, 2, 3), 1), "Centroids for x"),
        ((torch.ones(1, 1, 4, 2), torch.ones(1, 1, 2, 2).half(), 1), "must be float32"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(*arguments)
