"""Agent attention and pooled agents against their formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels.agent import reference
from dit_accel.kernels.agent.attention import agent_attention
from dit_accel.kernels.agent.joint import agent_attention_beside, full_plan
from dit_accel.kernels.agent.pooling import cell_bounds, pooled_agents

Sizes = tuple[int, int, int]


def tensors(
    queries: int = 61, keys: int = 61, agents: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch 3, two heads; strides of tokens before heads, as models give them."""
    generator = torch.Generator().manual_seed(queries)
    q, k, v, a = (
        torch.randn(3, n, 2, 24, generator=generator).to(dtype).transpose(1, 2) for n in (queries, keys, keys, agents)
    )
    return q, k, v, a


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 24**-0.5, "second_scale_power": 0.3, "shortcut": 0.075},
        {"scale": 24**-0.5, "second_scale_power": 1.0, "shortcut": 0.0},
        {"scale": 0.7, "second_scale_power": 0.5, "shortcut": 1.0},
    ],
)
def test_agent_attention_is_its_formula(dtype: torch.dtype, tolerance: float, settings: dict[str, Any]) -> None:
    given = tensors(dtype=dtype)
    out = agent_attention(*given, **settings)
    assert out.dtype == dtype and out.shape == given[0].shape
    torch.testing.assert_close(
        out.double(), reference.agent_attention(*given, **settings), rtol=tolerance, atol=tolerance
    )


def test_defaults_are_those_of_the_training_free_method() -> None:
    given = tensors()
    expected = reference.agent_attention(*given, scale=24**-0.5, second_scale_power=0.3, shortcut=0.075)
    torch.testing.assert_close(agent_attention(*given).double(), expected, rtol=1e-5, atol=1e-5)


def test_queries_and_keys_may_differ_in_number_without_shortcut() -> None:
    given = tensors(queries=13, keys=40)
    expected = reference.agent_attention(*given, scale=24**-0.5, second_scale_power=0.3, shortcut=0.0)
    torch.testing.assert_close(agent_attention(*given, shortcut=0.0).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="13 queries and 40 keys"):
        agent_attention(*given)


@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (3, 1)])
def test_agents_broadcast(lead: tuple[int, int]) -> None:
    q, k, v, agents = tensors()
    agents = agents[: lead[0], : lead[1]]
    wide = agent_attention(q, k, v, agents.expand(3, 2, -1, -1))
    torch.testing.assert_close(agent_attention(q, k, v, agents), wide, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("settings", [{"scale": None}, {"scale": 0.7, "second_scale_power": 1.0, "shortcut": 0.0}])
def test_keys_through_agents_and_exact_ones_share_a_softmax(
    dtype: torch.dtype, tolerance: float, settings: dict[str, Any]
) -> None:
    """Several blocks of each, the last of them short."""
    q, k, v, agents = tensors(queries=150, keys=150, agents=70, dtype=dtype)
    exact_k, exact_v = tensors(queries=75, keys=75, dtype=dtype)[1:3]
    plans: dict[str, Any] = {"gather": full_plan(70, 150, 64, q.device), "exact": full_plan(150, 75, 64, q.device)}
    out = agent_attention_beside(q, k, v, agents, exact_k, exact_v, **plans, **settings)
    wanted = {"second_scale_power": 0.3, "shortcut": 0.075} | settings | {"scale": settings["scale"] or 24**-0.5}
    expected = reference.agent_attention_beside(q, k, v, agents, exact_k, exact_v, **wanted)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_of_agent_attention() -> None:
    given = [t.detach().requires_grad_() for t in tensors(queries=9, agents=4, keys=9)]
    upstream = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad((agent_attention(*given) * upstream).sum(), given)
    expected = reference.agent_attention(*given, scale=24**-0.5, second_scale_power=0.3, shortcut=0.075)
    for gradient, wanted in zip(got, torch.autograd.grad((expected * upstream).sum(), given), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("backward", [False, True])
def test_no_scores_are_held(backward: bool) -> None:
    """Nothing grows beyond one tensor of tokens: neither N x N nor N x n."""
    q, k, v, agents = (t.detach().requires_grad_(backward) for t in tensors(queries=600, keys=600, agents=100))
    with Largest() as largest:
        out = agent_attention(q, k, v, agents)
        if backward:
            out.sum().backward()
    assert largest.elements == q.numel() < 3 * 2 * 600 * 100


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({0: torch.zeros(2, 5, 4)}, {}, "q must be"),
        ({3: torch.zeros(3, 2, 0, 24)}, {}, "agents must be"),
        ({1: torch.zeros(3, 2, 61, 24, dtype=torch.float64)}, {}, "k is torch.float64"),
        ({2: torch.zeros(3, 2, 60, 24)}, {}, "do not fit together"),
        ({3: torch.zeros(2, 2, 7, 24)}, {}, "1 or 3, 1 or 2"),
        ({3: torch.zeros(3, 2, 7, 16)}, {}, "agents, 24"),
        ({}, {"scale": 0.0}, "positive"),
    ],
)
def test_bad_input(change: dict[int, Tensor], settings: dict[str, Any], message: str) -> None:
    q, k, v, agents = (change.get(i, t) for i, t in enumerate(tensors()))
    with pytest.raises(ValueError, match=message):
        agent_attention(q, k, v, agents, **settings)


CASES: list[tuple[Sizes, Sizes]] = [
    ((4, 6, 8), (2, 3, 4)),
    ((5, 7, 9), (2, 3, 4)),
    ((3, 5, 7), (3, 5, 7)),
    ((3, 5, 7), (1, 1, 1)),
    ((1, 11, 6), (1, 4, 6)),
]


@pytest.mark.parametrize(("grid", "cells"), CASES)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (4, 0), (0, 3), (2, 5)])
def test_pooled_agents(grid: Sizes, cells: Sizes, before: int, after: int) -> None:
    video = math.prod(grid)
    q = tensors(queries=before + video + after)[0]
    text = [(0, before), (before + video, before + video + after)]
    pooled = pooled_agents(q, grid, cells, [part for part in text if part[0] < part[1]])
    assert pooled.shape == (3, 2, math.prod(cells), 24)
    expected = reference.pooled_agents(q, grid, cells, before)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-6, atol=1e-6)
    volume = q[:, :, before : before + video].transpose(-1, -2).reshape(6, 24, *grid)
    torch_pooled = torch.nn.functional.adaptive_avg_pool3d(volume, cells).view(3, 2, 24, -1).transpose(-1, -2)
    torch.testing.assert_close(pooled, torch_pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pooling_rounds_once(dtype: torch.dtype) -> None:
    q = tensors(queries=5 * 7 * 9, dtype=dtype)[0]
    pooled = pooled_agents(q, (5, 7, 9), (2, 3, 4))
    expected = reference.pooled_agents(q, (5, 7, 9), (2, 3, 4))
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled.double(), expected, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-6)


def test_gradients_of_pooling() -> None:
    q = torch.randn(2, 1, 3 + 2 * 3 * 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pooled_agents(x, (2, 3, 5), (1, 2, 3), [(0, 3)]), (q,))


def test_cells_cover_an_axis() -> None:
    assert cell_bounds(7, 3) == [(0, 3), (2, 5), (4, 7)]
    assert cell_bounds(6, 3) == [(0, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize(
    ("grid", "cells", "text", "message"),
    [
        ((2, 3, 4), (3, 1, 1), [], "cells must be"),
        ((2, 3, 4), (0, 1, 1), [], "cells must be"),
        ((2, 3, 5), (1, 1, 1), [], "do not make these up"),
        ((2, 3, 3), (1, 1, 1), [(3, 9)], "do not make these up"),
        ((2, 3, 4), (1, 1, 1), [(0, 3)], "do not make these up"),
    ],
)
def test_bad_pooling(grid: Sizes, cells: Sizes, text: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pooled_agents(tensors(queries=24)[0], grid, cells, text)
