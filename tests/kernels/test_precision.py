"""How the Triton kernels multiply float32: as torch's own switch says, whichever of its two spellings was used."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels.triton_kernels.forward_config import forward_precision

AMPERE = (8, 0)
# Attributes of torch's modules come and go with its version, so they are not looked up by type.
BACKENDS: Any = torch.backends
MATMUL: Any = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Puts torch's switches back, the newer ones to "none" where there are any."""
    yield
    if hasattr(MATMUL, "fp32_precision"):
        BACKENDS.fp32_precision = "none"
        MATMUL.fp32_precision = "none"
    else:
        MATMUL.allow_tf32 = False


@pytest.mark.parametrize(("allowed", "precision"), [(True, "tf32"), (False, "tf32x3")])
def test_the_older_switch(allowed: bool, precision: str) -> None:
    MATMUL.allow_tf32 = allowed
    assert forward_precision(True, AMPERE) == precision


@pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="this torch has the older switch only")
@pytest.mark.parametrize("module", [BACKENDS, MATMUL], ids=["all backends", "matmul"])
@pytest.mark.parametrize(("setting", "precision"), [("tf32", "tf32"), ("ieee", "tf32x3")])
def test_the_newer_switch(module: Any, setting: str, precision: str) -> None:
    module.fp32_precision = setting
    assert forward_precision(True, AMPERE) == precision


def test_a_torch_without_the_newer_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    assert forward_precision(True, AMPERE) == "tf32"


def test_other_products_have_no_switch() -> None:
    MATMUL.allow_tf32 = True
    assert forward_precision(False, AMPERE) == "ieee"
    assert forward_precision(True, None) == "ieee"
