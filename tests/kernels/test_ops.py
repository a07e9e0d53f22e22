"""attend as one operator of a compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel.kernels.attend import attend
from dit_accel.kernels.bitmap import Bitmap
from dit_accel.kernels.ops import block_sparse_attention
from dit_accel.kernels.pair_tests import Band, Neighborhood, PairTest, encode
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

TOKENS = 300
KINDS = ("none", "band", "neighborhood", "bitmap")


def make_test(seed: int, kind: str) -> PairTest | None:
    """A test whose tensors depend on the seed, but not their shapes."""
    if kind == "band":
        return Band(60, torch.tensor([60, 25, 10 + seed, -1, 0], dtype=torch.int32), 280, 20)
    if kind == "neighborhood":
        return Neighborhood.of((4, 7, 10), (1 + seed, 3 + seed, 5))
    if kind == "bitmap":
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(seed)
        return Bitmap.from_mask(mask, block_q=64, block_kv=64)
    return None


def make_plan(seed: int, *, kind: str = "none", ordered: bool = False) -> SparsePlan:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, 5, 5, generator=generator) < 0.5
    keep[:, 0] = True  # the same capacity for every seed
    order = torch.randperm(TOKENS, generator=generator) if ordered else None
    return plan_from_blocks(
        keep[None],
        partial=keep[None] & (torch.rand(5, 5, generator=generator) < 0.5) if kind != "none" else None,
        pair_test=make_test(seed, kind),
        order=order,
        q_len=TOKENS,
        kv_len=TOKENS,
        block_q=64,
        block_kv=64,
        method=f"seed {seed}",
    )


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, 2, 32, generator=generator).transpose(1, 2) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_operator_is_well_formed(kind: str, backend: str) -> None:
    plan = make_plan(1, kind=kind)
    test = encode(plan.pair_test)
    lists = (plan.indices, plan.counts, plan.full_counts, test.table, test.lookup, test.kind, test.numbers)
    arguments = (*tensors(), *lists, 64, 64, 32**-0.5, backend)
    outcome = torch.library.opcheck(block_sparse_attention, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("kind", "ordered"), [*((kind, False) for kind in KINDS), ("band", True), ("neighborhood", True)]
)
def test_one_graph_serves_plans_of_the_same_shapes(kind: str, ordered: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def layer(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> Tensor:
        out, lse = attend(q * 2, k, v, plan, return_lse=True)
        return out + attend(q, k, v, plan) + lse.exp()[..., None]

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    q, k, v = tensors()
    for seed in (1, 2, 3):
        plan = make_plan(seed, kind=kind, ordered=ordered)
        assert plan.density != make_plan(0, kind=kind).density
        torch.testing.assert_close(compiled(q, k, v, plan), layer(q, k, v, plan), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("block_sparse_attention" in str(node.target) for node in nodes) == 2


def test_errors_inside_the_operator_reach_the_caller() -> None:
    with pytest.raises(ValueError, match="cannot run this call"):
        attend(*tensors(), make_plan(1), backend="triton")
