"""What a method should save on a model and a device, before anything is run: Amdahl's law with a few constants.

On CPUs the constants are measured (``benchmarks/auto.py``, docs/benchmarks.md). On GPUs they are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.simulate import pipeline_speedup

OTHER_WORK = {"cpu": 30.0}
"""Work of a block besides its self- or joint attention, for one token: this many times its width squared.

Attention is 2 times the width for each pair of tokens. A usual block multiplies 12 times its width squared; what else
it does is slower than its sums. shapes-wan on a busy CPU: 21 and 26 at 2,304 tokens, 48 and 26 at 8,448."""
OTHER_WORK_GPU = 20.0
"""The same, from shares of attention that others published: 7 (Wan 14B, H100) to 48 (HunyuanVideo, B200)."""

EFFICIENCY = {"cpu": {"radial": 0.5, "compensated": 0.35, "block_routing": 0.55}}
"""Pairs per second over those of dense attention, choice of blocks included."""
EFFICIENCY_GPU = 0.8
"""The same for all methods, assumed."""


@dataclass(frozen=True)
class Estimate:
    """What sampling with a method should be like.

    Attributes:
        tokens: of one attention call.
        share: part of dense sampling that attention takes.
        density: part of the pairs that sparse calls compute.
        dense_share: part of the calls that stay dense.
        speedup: dense time over sampling time.
        measured: whether the constants are, on such a device.
    """

    tokens: int
    share: float
    density: float
    dense_share: float
    speedup: float
    measured: bool

    def describe(self) -> str:
        """One clause for people."""
        source = "measured on CPUs" if self.measured else "estimated, not measured on GPUs"
        return (
            f"{self.tokens:,} tokens, attention about {self.share:.0%} of the work, {self.density:.0%} of the pairs "
            f"in sparse calls, {self.dense_share:.0%} of the calls dense: about {self.speedup:.2f}x by Amdahl's law "
            f"(constants {source})"
        )


def estimate(method: str, *, tokens: int, width: int, density: float, dense_share: float, device: str) -> Estimate:
    """How much faster sampling should be.

    Args:
        method: its name.
        tokens: of one attention call.
        width: heads times head dimension.
        density: part of the pairs that sparse calls compute, in [0, 1].
        dense_share: part of the calls that stay dense, in [0, 1].
        device: its type; all but ``"cpu"`` count as GPUs.
    """
    measured = device in EFFICIENCY
    efficiency = EFFICIENCY[device][method] if measured else EFFICIENCY_GPU
    share = attention_share(tokens, width, device)
    speedup = pipeline_speedup(share, dense_share, density, efficiency)
    return Estimate(tokens, share, density, dense_share, speedup, measured)


def attention_share(tokens: int, width: int, device: str) -> float:
    """Part of the time of a model that its self- or joint attention takes, dense."""
    pairs = 2 * tokens
    return pairs / (pairs + OTHER_WORK.get(device, OTHER_WORK_GPU) * width)
