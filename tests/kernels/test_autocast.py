"""Autocast rounds the products of a model, but nothing inside our operators: what they are given decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.gate.teacher import block_maps
from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.residual import block_residual

from .residual_cases import leaves_of, random_plan, tensors

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("backend", "means", "banded"),
    [("gather", False, False), ("gather", False, True), ("gather", True, False), ("reference", False, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outputs_and_gradients(dtype: torch.dtype, backend: str, means: bool, banded: bool) -> None:
    band = Band(30, torch.tensor([30, 9, 4, 0, -1], dtype=torch.int32), 140, 10) if banded else None
    plan, inputs = random_plan(150, 150, 32, 32, 1, 2, pair_test=band), tensors(1, 2, 150, 150, 16, dtype)
    cotangent = torch.randn_like(inputs[0])

    def run(autocast: bool) -> list[Tensor]:
        q, k, v = leaves_of(*inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            residual = block_residual(k, v, 32) if means else None
            out = attend(q, k, v, plan, residual=residual, backend=backend)
            out.backward(cotangent)
        assert q.grad is not None and k.grad is not None and v.grad is not None
        return [out.detach(), q.grad, k.grad, v.grad]

    for found, expected in zip(run(True), run(False), strict=True):
        assert found.dtype == expected.dtype == dtype and torch.equal(found, expected)


def test_what_gates_are_taught() -> None:
    q, k = torch.randn(2, 1, 70, 2, 16).unbind()
    expected = block_maps(q, k, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = block_maps(q, k, 16)
    for ours, plain in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, plain)
