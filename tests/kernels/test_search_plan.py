"""dynamic_plan: right blocks, right lists, and nothing read back from the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels.attend import attend
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.search.always import always_blocks
from dit_accel.kernels.search.mass import block_mass
from dit_accel.kernels.search.plan import count_density, default_stride, dynamic_plan
from dit_accel.kernels.search.pooled import pooled_scores, sub_block_scores
from dit_accel.kernels.search.select import select_threshold, select_topk, select_topp
from dit_accel.kernels.sparse_plan import plan_from_blocks

SIZES: dict[str, Any] = {"block_q": 32, "block_kv": 16}
RULES: list[tuple[str, Any]] = [("topk", 4), ("topk", 0.3), ("topp", 0.8), ("threshold", 0.1)]
SCORES = ["mass", "pooled", "lse"]


def tensors(q_len: int = 203, kv_len: int = 150, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 3, 16, generator=generator).to(device) for n in (q_len, kv_len))
    return q, k


def shares_of(score: str, q: Tensor, k: Tensor) -> Tensor:
    if score == "mass":
        mass = block_mass(q, k, **SIZES)
        return mass / mass.sum(-1, keepdim=True)
    if score == "pooled":
        keys = torch.full((10,), 16.0)
        keys[-1] = 150 - 9 * 16
        weights = pooled_scores(q, k, **SIZES).exp() * keys
        return weights / weights.sum(-1, keepdim=True)
    return sub_block_scores(q, k, **SIZES, stride=4).softmax(-1)


@pytest.mark.parametrize(("keep", "amount"), RULES)
@pytest.mark.parametrize("score", SCORES)
def test_plan_keeps_what_score_and_rule_say(score: Any, keep: Any, amount: Any) -> None:
    q, k = tensors()
    plan = dynamic_plan(q, k, **SIZES, score=score, keep=keep, amount=amount)
    shares = shares_of(score, q, k)
    if keep == "topk":
        wanted = select_topk(shares, 4 if amount == 4 else 3)
    else:
        wanted = (select_topp if keep == "topp" else select_threshold)(shares, amount)
    assert torch.equal(plan.to_bool(), wanted)
    assert (plan.q_len, plan.kv_len, plan.block_q, plan.block_kv) == (203, 150, 32, 16)
    assert plan.stats.details["score"] == score and plan.stats.details["backend"] == "torch"


@pytest.mark.parametrize(("keep", "amount"), RULES)
def test_attention_under_the_plan(keep: Any, amount: Any) -> None:
    q, k = tensors(150)
    plan = dynamic_plan(q, k, **SIZES, keep=keep, amount=amount)
    same = plan_from_blocks(plan.to_bool(), q_len=150, kv_len=150, **SIZES)
    turned = [x.transpose(1, 2) for x in (q, k, k)]
    out = attend(turned[0], turned[1], turned[2], plan, backend="gather")
    wanted = attend(turned[0], turned[1], turned[2], same, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_lists_are_narrow_where_the_rule_bounds_them() -> None:
    q, k = tensors()
    assert dynamic_plan(q, k, **SIZES, amount=3).indices.shape[-1] == 3
    assert dynamic_plan(q, k, **SIZES, amount=1, minimum=2).indices.shape[-1] == 2
    assert dynamic_plan(q, k, **SIZES, amount=0.2).indices.shape[-1] == 2
    assert dynamic_plan(q, k, **SIZES, amount=99).indices.shape[-1] == 10
    assert dynamic_plan(q, k, **SIZES, amount=0, minimum=0).counts.eq(0).all()
    assert dynamic_plan(q, k, **SIZES, amount=1, always_kv=[(0, 1)]).indices.shape[-1] == 10
    assert dynamic_plan(q, k, **SIZES, keep="topp", amount=0.1).indices.shape[-1] == 10


def test_small_scores_are_still_told_apart_by_topk() -> None:
    q = torch.ones(1, 16, 1, 16)
    k = -torch.arange(10.0).repeat_interleave(16)[None, :, None, None].expand(1, 160, 1, 16) * 100
    plan = dynamic_plan(q, k, block_q=16, block_kv=16, amount=3)
    assert plan.indices[0, 0, 0].tolist() == [0, 1, 2]
    turned = dynamic_plan(q, k.flip(1), block_q=16, block_kv=16, amount=3)
    assert turned.indices[0, 0, 0].tolist() == [7, 8, 9]


def test_head_levels() -> None:
    q, k = tensors()
    plan = dynamic_plan(q, k, **SIZES, amount=torch.tensor([[1], [5], [9]]))
    assert torch.equal(plan.counts, torch.tensor([1, 5, 9], dtype=torch.int32)[None, :, None].expand(2, 3, 7))


def test_always_kept_blocks() -> None:
    q, k = tensors()
    mask = torch.zeros(2, 1, 7, 10, dtype=torch.bool)
    mask[1, :, 2, 6] = True
    ranges: dict[str, Any] = {"always_q": [(200, 203)], "always_kv": [(15, 17), (149, 150), (40, 40)]}
    kept = dynamic_plan(q, k, **SIZES, keep="topp", amount=0.0, minimum=0, always=mask, **ranges).to_bool()
    wanted = torch.zeros(2, 3, 7, 10, dtype=torch.bool)
    wanted[..., 6, :] = True
    wanted[..., [0, 1, 9]] = True
    wanted[1, :, 2, 6] = True
    assert torch.equal(kept, wanted)
    plan = dynamic_plan(q, k, **SIZES, amount=4, **ranges)
    assert plan.always_q == ((200, 203),) and plan.always_kv == ((15, 17), (149, 150), (40, 40))
    assert plan.to_bool()[..., [0, 1, 9]].all() and plan.counts[..., :6].eq(4).all()


def test_cached_lse_is_used() -> None:
    q, k = tensors()
    _, lse = block_mass(q, k, **SIZES, return_lse=True)
    options: dict[str, Any] = {**SIZES, "score": "mass", "keep": "topp", "amount": 0.7}
    assert torch.equal(dynamic_plan(q, k, lse=lse, **options).to_bool(), dynamic_plan(q, k, **options).to_bool())
    lse[:, :, :31] = float("-inf")  # of the first row of blocks only the last query counts
    alone = dynamic_plan(q[:, 31:32], k, **options).to_bool()
    assert torch.equal(dynamic_plan(q, k, lse=lse, **options).to_bool()[..., :1, :], alone)


def test_density_is_counted_on_demand() -> None:
    q, k = tensors()
    plan = dynamic_plan(q, k, **SIZES, amount=4)
    assert math.isnan(plan.density)
    counted = count_density(plan)
    assert counted.density == pytest.approx(plan.element_mask().double().mean().item(), abs=1e-12)
    assert len(counted.stats.density_per_head) == 3
    assert counted.stats.details == plan.stats.details and counted.indices is plan.indices
    band = Band(30, torch.tensor([30, 9, 5, 2, 0], dtype=torch.int32), 150)
    banded = plan_from_blocks(torch.ones(5, 10, dtype=torch.bool), pair_test=band, q_len=150, kv_len=150, **SIZES)
    assert count_density(banded).density == banded.density


class NoHostSync(TorchDispatchMode):
    """Refuses the operators through which torch itself reads values or shapes back from the device."""

    REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert not name.startswith("unique") and name not in self.REFUSED, f"{name} waits for the device"
        if name == "index":
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]), "boolean index"
        return func(*args, **(kwargs or {}))


READERS = ("item", "tolist", "nonzero", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def no_host_sync(monkeypatch: pytest.MonkeyPatch) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a value was read back from the device")

    for name in READERS:
        monkeypatch.setattr(Tensor, name, refuse)
    for read in (lambda x: x.item(), bool, float, lambda x: x.nonzero(), lambda x: [1, 2][x]):
        with pytest.raises(AssertionError, match="read back"):
            read(torch.zeros((), dtype=torch.int64))
    with NoHostSync():
        with pytest.raises(AssertionError, match="waits"):
            torch.nonzero(torch.ones(2))
        with pytest.raises(AssertionError, match="boolean index"):
            torch.ones(2)[torch.ones(2) > 0]
        yield
    monkeypatch.undo()


@pytest.mark.parametrize(("keep", "amount"), [*RULES, ("topk", torch.tensor([[1], [5], [9]]))])
@pytest.mark.parametrize("score", SCORES)
def test_no_host_sync(score: Any, keep: Any, amount: Any, no_host_sync: None) -> None:
    q, k = tensors()
    options: dict[str, Any] = {**SIZES, "score": score, "keep": keep, "amount": amount}
    dynamic_plan(q, k, **options)
    dynamic_plan(q, k, **options, always=torch.ones(7, 10) > 0, always_q=[(0, 3)], always_kv=[(3, 9)], minimum=2)


@pytest.mark.parametrize("variance", ["diag", "exact"])
def test_no_host_sync_by_the_gaussian_rule(variance: Any, no_host_sync: None) -> None:
    q, k = tensors()
    options: dict[str, Any] = {**SIZES, "keep": "gaussian", "variance": variance}
    dynamic_plan(q, k, **options, amount=1.0)
    dynamic_plan(q, q, **options, amount=torch.ones(3, 1), always_q=[(0, 3)], always_kv=[(3, 9)], minimum=4)


@pytest.mark.parametrize(("keep", "amount"), RULES)
@pytest.mark.parametrize("score", SCORES)
def test_plan_depends_on_no_value(score: Any, keep: Any, amount: Any) -> None:
    q, k = tensors(device="meta")  # has shapes but no values to look at
    plan = dynamic_plan(q, k, **SIZES, score=score, keep=keep, amount=amount, always_kv=[(0, 3)])
    assert plan.indices.shape == (2, 3, 7, 10) and plan.device.type == "meta"


def test_search_takes_no_part_in_autograd() -> None:
    q, k = (x.requires_grad_() for x in tensors())
    for score in SCORES:
        assert not dynamic_plan(q, k, **SIZES, score=score, amount=2).indices.requires_grad  # type: ignore[arg-type]
    assert not block_mass(q, k, **SIZES).requires_grad and not pooled_scores(q, k, **SIZES).requires_grad


@pytest.mark.parametrize(("sizes", "stride"), [((128, 128), 32), ((64, 128), 16), ((48, 80), 4), ((30, 20), 10)])
def test_default_stride(sizes: tuple[int, int], stride: int) -> None:
    assert default_stride(*sizes) == stride


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "sum"}, "Unknown score"),
        ({"keep": "best"}, "Unknown rule"),
        ({"amount": 1.5}, "int"),
        ({"amount": -1}, "negative"),
        ({"amount": torch.tensor([[0.5]])}, "integer"),
        ({"keep": "topp", "amount": 2.0}, "between 0 and 1"),
        ({"stride": 4}, "stride belongs"),
        ({"lse": torch.zeros(2, 3, 203)}, "lse belongs"),
        ({"always": torch.ones(3, 3, dtype=torch.bool)}, "broadcast"),
        ({"always_q": [(0, 204)]}, "not a range"),
        ({"backend": "gather"}, "Unknown search backend"),
        ({"backend": "triton"}, "cannot run this call"),
        ({"k": torch.zeros(2, 150, 1, 16)}, "do not fit"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    q, k = tensors()
    good: dict[str, Any] = {"q": q, "k": k, **SIZES, "amount": 4}
    with pytest.raises(ValueError, match=message):
        dynamic_plan(**(good | change))


def test_blocks_touched_by_ranges() -> None:
    marked = always_blocks(100, 70, 32, 32, always_q=[(96, 100)], always_kv=[(31, 33)])
    wanted = torch.zeros(4, 3, dtype=torch.bool)
    wanted[3], wanted[:, :2] = True, True
    assert torch.equal(marked, wanted)


@pytest.mark.parametrize(("keep", "amount"), [("topk", 0.3), ("topk", 3), ("topp", 0.5)])
@pytest.mark.parametrize("score", SCORES)
def test_search_and_attention_compile_to_one_graph(score: Any, keep: Any, amount: float) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def layer(q: Tensor, k: Tensor) -> Tensor:
        plan = dynamic_plan(q, k, **SIZES, score=score, keep=keep, amount=amount, always_kv=[(0, 3)])
        return attend(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), plan)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for scale in (1.0, 5.0):
        q, k = (x * scale for x in tensors())
        torch.testing.assert_close(compiled(q, k), layer(q, k), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
