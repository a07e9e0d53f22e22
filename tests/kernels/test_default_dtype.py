"""Torch's default dtype changes nothing inside the kernels: what they hold beside their inputs is float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.agent.merging import draw_destinations
from dit_accel.kernels.cluster.kmeans import kmeans
from dit_accel.kernels.cluster.plan import ClusterRule, cluster_mass, cluster_plan
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.search.plan import device_density

from .conftest import UnderDefault
from .residual_cases import leaves_of, random_plan, residual_attention, tensors

Compare = Callable[[Callable[[], Sequence[Tensor | None]]], None]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def same(request: pytest.FixtureRequest, under_default: UnderDefault) -> Compare:
    """Makes sure that a call gives the same tensors under another default dtype."""

    def compare(call: Callable[[], Sequence[Tensor | None]]) -> None:
        for found, expected in zip(under_default(request.param, call), call(), strict=True):
            assert found is not None and expected is not None
            assert found.dtype == expected.dtype and torch.equal(found, expected)

    return compare


@pytest.mark.parametrize(("exact", "count"), [(False, None), (True, None), (False, 2), (True, 30)])
def test_cluster_search(exact: bool, count: int | None, same: Compare) -> None:
    q, k = torch.randn(2, 1, 2, 60, 8).unbind()
    rule = ClusterRule((50, 60), 4, 6, 2, 16, 0.7, 1, 4, exact)
    counts = None if count is None else torch.tensor([[count]])

    def search() -> Sequence[Tensor]:
        plan, centers = cluster_plan(q, k, rule, counts=counts)
        assert plan.order is not None and plan.kv_order is not None
        test = () if plan.pair_test is None else plan.pair_test.tensors()
        return plan.indices, plan.counts, plan.full_counts, plan.order, plan.kv_order, *centers, *test

    same(search)


def test_cluster_mass(same: Compare) -> None:
    q, k = torch.randn(2, 1, 2, 60, 8).unbind()
    same(lambda: cluster_mass(kmeans(q, 4, 2), kmeans(k, 6, 2), 0.3))


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_residual_and_its_gradients(backend: str, same: Compare) -> None:
    inputs, plan = tensors(1, 2, 150, 150, 16), random_plan(150, 150, 32, 32, 1, 2)
    cotangent = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3])

    def run() -> Sequence[Tensor | None]:
        leaves = leaves_of(*inputs)
        found = residual_attention(*leaves, plan, backend)
        torch.autograd.backward(found, cotangent)
        return *(x.detach() for x in found), *(leaf.grad for leaf in leaves)

    same(run)


def test_density_of_a_band(same: Compare) -> None:
    band = Band(30, torch.tensor([30, 9, 4, 0, -1], dtype=torch.int32), 140, 10)
    plan = random_plan(150, 150, 32, 32, pair_test=band)
    same(lambda: (device_density(plan),))


def test_draws(same: Compare) -> None:
    same(lambda: (draw_destinations((2, 5, 7), (1, 2, 3), torch.Generator().manual_seed(0), 3),))
