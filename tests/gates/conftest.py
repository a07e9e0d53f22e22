"""Gates of the tiny pipelines: random ones, which is all that most tests need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dit_accel.gates.files import Gates, save_gates
from dit_accel.kernels.gate.gate import EMBEDDING, GateWeights


def random_weights(heads: int, head_dim: int, d_gate: int = 4, seed: int = 0) -> GateWeights:
    """In numbers that 16 bits hold."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, head_dim, d_gate), (heads, 3 * head_dim, d_gate), (heads, EMBEDDING, 2 * d_gate))
    return GateWeights(*(torch.randn(shape, generator=generator).half().float() for shape in shapes))


def wan_gates(heads: int = 2, head_dim: int = 16, layers: int = 2) -> Gates:
    """Of the tiny Wan, as far as the numbers fit."""
    sites = {f"transformer:blocks.{i}.attn1": random_weights(heads, head_dim, seed=i) for i in range(layers)}
    return Gates("WanTransformer3DModel", {"self": layers}, 64, 1000.0, sites, {"steps": 3})


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Gates], Path]:
    """Writes gates and gives the path."""

    def run(gates: Gates) -> Path:
        save_gates(gates, tmp_path / "gates.safetensors")
        return tmp_path / "gates.safetensors"

    return run
