"""Sol-Attn's rule against loops written from its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel.kernels.attend import attend
from dit_accel.kernels.search.gaussian import neighbor_blocks, select_gaussian
from dit_accel.kernels.search.plan import count_density, dynamic_plan


def tensors(q_len: int = 139, kv_len: int = 139, *, batch: int = 2, dim: int = 8, device: str = "cpu") -> Any:
    generator = torch.Generator().manual_seed(q_len + kv_len)
    mix = torch.randn(dim, dim, generator=generator)  # dimensions that vary together: "diag" is not "exact"
    q, k = (torch.randn(batch, n, 3, dim, generator=generator) @ mix for n in (q_len, kv_len))
    return q.to(device), k.to(device)


def brute_force(q: Tensor, k: Tensor, block_q: int, block_kv: int, tau: float, variance: str, scale: float) -> Tensor:
    """Loops in float64 over rows, blocks and dimensions."""
    a = scale / math.log(2)
    rows, cols = -(-q.shape[1] // block_q), -(-k.shape[1] // block_kv)
    kept = torch.zeros(q.shape[0], q.shape[2], rows, cols, dtype=torch.bool)
    for b, h, i in ((b, h, i) for b in range(q.shape[0]) for h in range(q.shape[2]) for i in range(rows)):
        queries = q[b, i * block_q : (i + 1) * block_q, h].double()
        means = [k[b, j * block_kv : (j + 1) * block_kv, h].double().mean(0) for j in range(cols)]
        center, c = torch.stack(means).mean(0), queries.mean(0)
        apart = [mean - center for mean in means]
        if variance == "diag":
            spread = sum(float(c[d]) ** 2 * sum(float(x[d]) ** 2 for x in apart) / cols for d in range(len(c)))
        else:
            spread = float(c @ torch.stack([torch.outer(x, x) for x in apart]).mean(0) @ c)
        threshold = a * float(c @ center) + tau * math.sqrt(a * a * spread + 1e-6)
        for j in range(cols):
            score = float((queries @ means[j] * a).mean())
            near = q.shape[1] == k.shape[1] and i * block_q < (j + 2) * block_kv
            near = near and j * block_kv < (i + 1) * block_q + block_kv
            kept[b, h, i, j] = score > threshold or near
    return kept


@pytest.mark.parametrize("variance", ["diag", "exact"])
@pytest.mark.parametrize("tau", [-0.5, 0.4, 1.0])
@pytest.mark.parametrize(
    ("lengths", "blocks"), [((139, 139), (16, 16)), ((139, 139), (32, 16)), ((97, 139), (32, 16))]
)
def test_formula(variance: Any, tau: float, lengths: tuple[int, int], blocks: tuple[int, int]) -> None:
    q, k = tensors(*lengths)
    kept = select_gaussian(q, k, tau, block_q=blocks[0], block_kv=blocks[1], variance=variance, minimum=0)
    wanted = brute_force(q, k, *blocks, tau, variance, q.shape[-1] ** -0.5)
    assert torch.equal(kept, wanted) and 0.1 < kept.float().mean() < 0.9


@pytest.mark.parametrize("variance", ["diag", "exact"])
@pytest.mark.parametrize("scale", [1e-6, 3.0])
def test_scale_and_the_floor_of_the_spread(variance: Any, scale: float) -> None:
    q, k = tensors()
    kept = select_gaussian(q, k, 1.0, block_q=16, block_kv=16, variance=variance, scale=scale)
    assert torch.equal(kept, brute_force(q, k, 16, 16, 1.0, variance, scale))
    assert kept[..., 0, 2:].any() == (scale > 1)


def test_diag_and_exact_differ() -> None:
    q, k = tensors()
    diag, exact = (select_gaussian(q, k, 1.0, block_q=16, block_kv=16, variance=v) for v in ("diag", "exact"))
    assert not torch.equal(diag, exact)


@pytest.mark.parametrize("variance", ["diag", "exact"])
@pytest.mark.parametrize(("tau", "share"), [(1.0, 0.159), (1.5, 0.067), (2.0, 0.023)])
def test_share_kept_of_gaussian_data(variance: Any, tau: float, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 4, 32, generator=generator) for n in (256, 4096))
    kept = select_gaussian(q, k, tau, block_q=8, block_kv=8, variance=variance, minimum=0)
    assert kept.float().mean().item() == pytest.approx(share, rel=0.08)


def test_neighbors_are_within_one_block() -> None:
    near = neighbor_blocks(100, 16, 16)
    i = torch.arange(7)
    assert torch.equal(near, (i[:, None] - i).abs() <= 1)
    wide = neighbor_blocks(128, 64, 32)
    assert wide.tolist() == [[True, True, True, False], [False, True, True, True]]


def test_rows_without_spread_keep_their_neighbors_only() -> None:
    q, k = torch.randn(1, 160, 2, 16), torch.ones(1, 160, 2, 16)
    kept = select_gaussian(q, k, 0.5, block_q=16, block_kv=16)
    assert torch.equal(kept, neighbor_blocks(160, 16, 16).expand_as(kept))


def test_tau_per_head_and_minimum() -> None:
    q, k = tensors(139, 102)
    tau = torch.tensor([[-9.0], [0.3], [9.0]])
    options: dict[str, Any] = {"block_q": 16, "block_kv": 16}
    kept = select_gaussian(q, k, tau, **options, minimum=0)
    assert kept[:, 0].all() and not kept[:, 2].any()
    assert torch.equal(kept[:, 1], select_gaussian(q, k, 0.3, **options, minimum=0)[:, 1])
    at_least = select_gaussian(q, k, tau, **options, minimum=3)
    assert at_least[:, 2].sum(-1).eq(3).all() and (at_least | kept).equal(at_least)


def test_plan() -> None:
    q, k = tensors()
    ranges: dict[str, Any] = {"always_q": [(130, 139)], "always_kv": [(30, 34)]}
    plan = dynamic_plan(q, k, block_q=16, block_kv=16, keep="gaussian", amount=1.0, **ranges)
    wanted = brute_force(q, k, 16, 16, 1.0, "diag", 8**-0.5)
    wanted[..., 8, :] = True
    wanted[..., [1, 2]] = True
    assert torch.equal(plan.to_bool(), wanted)
    assert plan.stats.details["keep"] == "gaussian" and plan.stats.details["variance"] == "diag"
    exact = dynamic_plan(q, k, block_q=16, block_kv=16, keep="gaussian", amount=1.0, variance="exact")
    assert torch.equal(exact.to_bool(), brute_force(q, k, 16, 16, 1.0, "exact", 8**-0.5))
    assert 0 < count_density(exact).density < count_density(plan).density


def test_plan_depends_on_no_value() -> None:
    q, k = tensors(device="meta")  # has shapes but no values to look at
    assert dynamic_plan(q, k, block_q=16, block_kv=16, keep="gaussian", amount=1.0).indices.device.type == "meta"


def test_search_and_attention_compile_to_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def layer(q: Tensor, k: Tensor) -> Tensor:
        plan = dynamic_plan(q, k, block_q=16, block_kv=16, keep="gaussian", amount=1.0, always_kv=[(0, 3)])
        return attend(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), plan)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for factor in (1.0, 5.0):
        q, k = (x * factor for x in tensors())
        torch.testing.assert_close(compiled(q, k), layer(q, k), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "mass"}, "rule for score='pooled'"),
        ({"variance": "full"}, "Unknown variance"),
        ({"keep": "topk", "amount": 2, "variance": "diag"}, "variance belongs"),
        ({"always": torch.ones(3, 3, dtype=torch.bool)}, "broadcast"),
        ({"minimum": -1}, "negative"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    q, k = tensors()
    good: dict[str, Any] = {"block_q": 16, "block_kv": 16, "keep": "gaussian", "amount": 1.0}
    with pytest.raises(ValueError, match=message):
        dynamic_plan(q, k, **(good | change))
