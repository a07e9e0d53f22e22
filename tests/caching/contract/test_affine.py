"""Extrapolation of order 1 over true gaps is exact on a model that is affine in time; over other gaps it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.caching.policies.static import Static
from dit_accel.caching.predictors.base import Predictor
from dit_accel.caching.predictors.reuse import Reuse
from dit_accel.caching.predictors.taylor import Taylor
from dit_accel.caching.recipe import Cache
from dit_accel.caching.scopes.base import Scope
from dit_accel.caching.scopes.blocks import EachBlock, Runs, Tail, Whole
from dit_accel.caching.scopes.output import Output

from .affine import AffinePipeline
from .defects import CountedGaps

MASK = (1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0)  # gaps of 1, 3, 2 and 4 steps
EVEN = torch.linspace(11.0, 0.0, 12, dtype=torch.float64)
UNEVEN = torch.linspace(3.0, 0.5, 12, dtype=torch.float64) ** 2
Put = Callable[[AffinePipeline], AbstractContextManager[Any]]


def check_exact(pipe: AffinePipeline, put: Put) -> None:
    """Every step is that of the model alone, to rounding, although some are skipped."""
    plain = pipe.run()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    blocks = pipe.components["transformer"].blocks
    handles = [block.linear.register_forward_hook(count) for block in blocks]
    with put(pipe):
        outputs = pipe.run()
    for handle in handles:
        handle.remove()
    assert calls < len(plain) * len(blocks)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, plain, strict=True))
    assert worst < 1e-6, f"worst relative error {worst}"


def ours(predictor: Predictor, scope: Scope) -> Put:
    return lambda pipe: dit_accel.accelerate(pipe, cache=Cache(scope, Static(mask=MASK), predictor))


def diffusers_taylor(**settings: Any) -> Put:
    @contextmanager
    def put(pipe: AffinePipeline) -> Iterator[None]:
        from diffusers import TaylorSeerCacheConfig

        root = pipe.components["transformer"]
        root.enable_cache(TaylorSeerCacheConfig(3, 2, cache_identifiers=[r"blocks\.\d+"], **settings))
        yield
        root.disable_cache()

    return put


SCOPES = [Whole(), Tail(1), EachBlock(), Runs((0, 2)), Output(), Output(residual=False)]


@pytest.mark.parametrize("scope", SCOPES, ids=repr)
@pytest.mark.parametrize(("along", "times"), [("step", EVEN), ("sigma", UNEVEN)], ids=["steps", "sigmas"])
def test_a_straight_line_is_continued_exactly(along: Any, times: torch.Tensor, scope: Scope) -> None:
    check_exact(AffinePipeline(times), ours(Taylor(1, along=along, kappa=None), scope))


@pytest.mark.parametrize(
    ("predictor", "times"),
    [
        (CountedGaps(1, kappa=None), EVEN),  # as if computed steps were neighbors
        (Taylor(1, along="step", kappa=None), UNEVEN),  # as if noise levels were evenly spaced
        (Reuse(), EVEN),
    ],
    ids=["counted gaps", "steps for sigmas", "no slope"],
)
@pytest.mark.parametrize("scope", SCOPES, ids=repr)
def test_other_gaps_are_seen(predictor: Predictor, times: torch.Tensor, scope: Scope) -> None:
    with pytest.raises(AssertionError, match="worst relative error"):
        check_exact(AffinePipeline(times), ours(predictor, scope))


def test_the_factors_of_diffusers_are_rounded_to_sixteen_bits_unless_told_otherwise() -> None:
    check_exact(AffinePipeline(EVEN), diffusers_taylor(taylor_factors_dtype=torch.float64))
    with pytest.raises(AssertionError, match="worst relative error"):
        check_exact(AffinePipeline(EVEN), diffusers_taylor())
