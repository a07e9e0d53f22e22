"""Token orders that differ between heads, and between queries and keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.convert import plan_to_block_map, plan_to_flex
from dit_accel.kernels.pair_tests import Neighborhood
from dit_accel.kernels.permute import permuted, put_back
from dit_accel.kernels.residual import block_residual
from dit_accel.kernels.search.plan import count_density, device_density
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks
from dit_accel.kernels.token_order import plan_in_order

from .head_order_cases import BLOCK_KV, BLOCK_Q, CASES, bitmap, dense, orders, random_plan, tensors
from .interpreter_runner import interpreted

BATCH, HEADS, TOKENS = 2, 3, 70
# Shapes of the orders of queries and keys; None: no order, or that of the queries.
SHAPES = (
    ((BATCH, HEADS), None),
    ((1, HEADS), None),
    ((BATCH, HEADS), (BATCH, HEADS)),
    ((1, HEADS), (BATCH, 1)),
    ((), (1, HEADS)),
    ((BATCH, 1), ()),
    (None, (BATCH, HEADS)),
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def made_plan(
    of_queries: tuple[int, ...] | None,
    of_keys: tuple[int, ...] | None,
    lists: tuple[int, int] = (BATCH, HEADS),
    kv_len: int = TOKENS,
    cut: bool = False,
) -> SparsePlan:
    """A plan with orders of such shapes."""
    order = None if of_queries is None else orders(TOKENS, *of_queries)
    kv_order = None if of_keys is None else orders(kv_len, *of_keys)
    test = bitmap(TOKENS, kv_len, *lists) if cut else None
    return random_plan(TOKENS, kv_len, *lists, order=order, kv_order=kv_order, pair_test=test)


def listed(plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """Head by head: which tokens see each other, and which key blocks the row of a query lists."""
    sees = torch.zeros(BATCH, HEADS, plan.q_len, plan.kv_len, dtype=torch.bool)
    lists = torch.zeros(BATCH, HEADS, plan.q_len, plan.num_kv_blocks, dtype=torch.bool)
    p, r = torch.arange(plan.q_len), torch.arange(plan.kv_len)
    kept, whole = (x.expand(BATCH, HEADS, -1, -1) for x in (plan.to_bool(), plan.to_bool(full_only=True)))
    asked = torch.ones(BATCH, HEADS, plan.q_len, plan.kv_len, dtype=torch.bool)
    if plan.pair_test is not None:
        asked = plan.pair_test.keeps(p[:, None], r).expand_as(asked)
    for b in range(BATCH):
        for h in range(HEADS):
            q_order = p if plan.order is None else plan.order.expand(BATCH, HEADS, -1)[b, h]
            kv_order = r if plan.key_order is None else plan.key_order.expand(BATCH, HEADS, -1)[b, h]
            lists[b, h, q_order] = kept[b, h, p // BLOCK_Q]
            blocks = (p[:, None] // BLOCK_Q, r // BLOCK_KV)
            in_plan = kept[b, h][blocks] & (whole[b, h][blocks] | asked[b, h])
            sees[b, h, q_order[:, None], kv_order] = in_plan
    return sees, lists


@pytest.mark.parametrize(("of_queries", "of_keys"), SHAPES)
@pytest.mark.parametrize(("lists", "cut"), [((BATCH, HEADS), False), ((1, 1), False), ((BATCH, HEADS), True)])
def test_element_mask_equals_head_by_head(
    of_queries: tuple[int, ...] | None, of_keys: tuple[int, ...] | None, lists: tuple[int, int], cut: bool
) -> None:
    plan = made_plan(of_queries, of_keys, lists, cut=cut)
    assert torch.equal(plan.element_mask().expand(BATCH, HEADS, -1, -1), listed(plan)[0])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["gather", "reference", "flex"])
@pytest.mark.parametrize(("of_queries", "of_keys"), SHAPES)
@pytest.mark.parametrize(("lists", "cut"), [((BATCH, HEADS), True), ((1, 1), False)])
def test_attention(
    backend: str,
    of_queries: tuple[int, ...] | None,
    of_keys: tuple[int, ...] | None,
    lists: tuple[int, int],
    cut: bool,
) -> None:
    plan = made_plan(of_queries, of_keys, lists, cut=cut)
    q, k, v = tensors(BATCH, HEADS, TOKENS, TOKENS)
    found = attend(q, k, v, plan, scale=0.25, return_lse=True, backend=backend)
    for ours, expected in zip(found, dense(q, k, v, listed(plan)[0]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize(("of_queries", "of_keys"), SHAPES)
def test_gradients(backend: str, of_queries: tuple[int, ...] | None, of_keys: tuple[int, ...] | None) -> None:
    plan = made_plan(of_queries, of_keys)
    q, k, v = leaves = [x.requires_grad_() for x in tensors(BATCH, HEADS, TOKENS, TOKENS)]
    mask = listed(plan)[0]
    weights = torch.randn(leaves[0].shape), torch.randn(leaves[0].shape[:3]) * mask.any(-1)

    def gradients(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        total = (out * weights[0]).sum() + (lse.masked_fill(~mask.any(-1), 0) * weights[1]).sum()
        return torch.autograd.grad(total, leaves)

    found = gradients(*attend(q, k, v, plan, scale=0.25, return_lse=True, backend=backend))
    for ours, expected in zip(found, gradients(*dense(q, k, v, mask)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize(("of_queries", "of_keys"), SHAPES)
def test_residual(backend: str, of_queries: tuple[int, ...] | None, of_keys: tuple[int, ...] | None) -> None:
    """Unlisted blocks, cut in the order of each head's keys, are one key with a bias, the log of its size."""
    plan = made_plan(of_queries, of_keys)
    leaves = [x.requires_grad_() for x in tensors(BATCH, HEADS, TOKENS, TOKENS)]
    q, k, v = leaves
    weights = torch.randn(q.shape)
    order = plan.key_order
    assert order is not None
    rows = order.expand(BATCH, HEADS, TOKENS)
    means = []
    for x in (k, v):
        in_order = torch.stack([torch.stack([x[b, h, rows[b, h]] for h in range(HEADS)]) for b in range(BATCH)])
        means.append(torch.stack([part.mean(2) for part in in_order.split(BLOCK_KV, 2)], 2))
    sizes = torch.tensor([BLOCK_KV, BLOCK_KV, TOKENS - 2 * BLOCK_KV]).log()
    sees, lists = listed(plan)
    scores = torch.cat((q @ k.transpose(-1, -2) * 0.25, q @ means[0].transpose(-1, -2) * 0.25 + sizes), -1)
    scores = scores.masked_fill(~torch.cat((sees, ~lists), -1), float("-inf"))
    expected = scores.softmax(-1) @ torch.cat((v, means[1]), 2)
    residual = block_residual(k, v, BLOCK_KV, order=order)
    out = attend(q, k, v, plan, residual=residual, scale=0.25, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_other_numbers_of_keys(backend: str) -> None:
    plan = made_plan((BATCH, HEADS), (1, HEADS), kv_len=45)
    q, k, v = tensors(BATCH, HEADS, TOKENS, 45)
    found = attend(q, k, v, plan, scale=0.25, backend=backend)
    torch.testing.assert_close(found, dense(q, k, v, listed(plan)[0])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (1, HEADS), (BATCH, 1), (BATCH, HEADS)])
def test_permuted_and_back(lead: tuple[int, ...]) -> None:
    x, order = torch.randn(BATCH, HEADS, 9, 4), orders(9, *lead)
    moved = permuted(x, order)
    wanted = order.expand(BATCH, HEADS, 9)
    assert all(
        torch.equal(moved[b, h, p], x[b, h, wanted[b, h, p]])
        for b in range(BATCH) for h in range(HEADS) for p in range(9)
    )  # fmt: skip
    assert torch.equal(put_back(moved, order), x)
    assert permuted(x, None) is x and put_back(x, None) is x


def test_compiled_code_takes_further_orders() -> None:
    q, k, v = tensors(BATCH, HEADS, TOKENS, TOKENS)
    run = torch.compile(lambda plan: attend(q, k, v, plan), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        plan = made_plan((BATCH, HEADS), (BATCH, HEADS))
        torch.testing.assert_close(run(plan), attend(q, k, v, plan), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("of_queries", "of_keys"), SHAPES)
def test_plan_of_tokens_that_were_permuted(
    of_queries: tuple[int, ...] | None, of_keys: tuple[int, ...] | None
) -> None:
    plan, order = made_plan(of_queries, of_keys), orders(TOKENS)
    inside = plan_in_order(plan, order)
    assert torch.equal(inside.element_mask(), plan.element_mask()[..., order, :][..., order])


def test_plan_for_this_very_order_has_none() -> None:
    order = orders(TOKENS)
    per_head = order.expand(1, HEADS, -1)
    assert plan_in_order(random_plan(TOKENS, TOKENS, order=per_head), order).order is None
    assert plan_in_order(random_plan(TOKENS, TOKENS, order=per_head), orders(TOKENS)).order is not None


def test_density_and_size_and_device() -> None:
    plan = made_plan((BATCH, HEADS), (1, HEADS), cut=True)
    expected = plan.element_mask().double().mean().item()
    assert plan.density == pytest.approx(expected)
    assert count_density(plan).density == pytest.approx(expected)
    assert device_density(plan).item() == pytest.approx(expected)
    assert plan.nbytes == replace(plan, order=None, kv_order=None).nbytes + 8 * (BATCH + 1) * HEADS * TOKENS
    moved = plan.to("meta")
    assert moved.order is not None and moved.kv_order is not None
    assert moved.order.device.type == moved.kv_order.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": torch.zeros(TOKENS, TOKENS, dtype=torch.int64)}, "or \\(batch or 1, heads or 1, 70\\)"),
        ({"order": torch.zeros(1, 1, 69, dtype=torch.int64)}, "order must be int64"),
        ({"kv_order": torch.zeros(1, 1, TOKENS, dtype=torch.int32)}, "kv_order must be int64"),
        ({"kv_order": torch.zeros(BATCH, 5, TOKENS, dtype=torch.int64)}, "kv_order is for \\(2, 5\\)"),
        ({"kv_order": torch.zeros(TOKENS, dtype=torch.int64, device="meta")}, "kv_order is on meta"),
        ({"order": torch.zeros(1, HEADS, TOKENS, dtype=torch.int64), "kv_len": 45}, "kv_order"),
    ],
)
def test_orders_that_do_not_fit(options: dict[str, object], message: str) -> None:
    sizes = {"q_len": TOKENS, "kv_len": TOKENS} | options
    keep = torch.ones(BATCH, HEADS, 5, -(-int(str(sizes["kv_len"])) // BLOCK_KV)) > 0
    with pytest.raises(ValueError, match=message):
        plan_from_blocks(keep, block_q=BLOCK_Q, block_kv=BLOCK_KV, **sizes)  # type: ignore[arg-type]


def test_calls_and_forms_that_cannot_hold_them() -> None:
    plan = made_plan((1, HEADS), (1, HEADS), (1, 1))
    with pytest.raises(ValueError, match="an order for batch 1 and 3 heads"):
        attend(*tensors(BATCH, 2, TOKENS, TOKENS), plan)
    with pytest.raises(ValueError, match="a kv_order for batch 1 and 3 heads"):
        attend(*tensors(BATCH, 2, TOKENS, TOKENS), replace(plan, order=None))
    for convert in (plan_to_block_map, plan_to_flex):
        for reordered in (plan, replace(plan, order=None)):
            with pytest.raises(ValueError, match=r"kv_order=None"):
                convert(reordered)
    keys = tensors(BATCH, 2, TOKENS, TOKENS)
    with pytest.raises(ValueError, match="order must be int64 of shape"):
        block_residual(keys[1], keys[2], BLOCK_KV, order=plan.key_order)
    with pytest.raises(ValueError, match="plan has a token order, the residual has none"):
        attend(
            *tensors(1, HEADS, TOKENS, TOKENS), plan, residual=block_residual(*tensors(1, HEADS, 1, TOKENS)[1:], 32)
        )
    for given in ({"order": plan.order}, {"order": orders(TOKENS), "kv_order": orders(TOKENS)}):
        with pytest.raises(ValueError, match="A Neighborhood knows where tokens stand"):
            random_plan(TOKENS, TOKENS, pair_test=Neighborhood.of((TOKENS,), 5), **given)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Results of head_order_cases.py under Triton's interpreter."""
    pytest.importorskip("triton")
    return interpreted("head_order_cases")


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_interpreted_kernels(case: str, results: dict[str, str]) -> None:
    assert results[case] == "ok", results[case]
