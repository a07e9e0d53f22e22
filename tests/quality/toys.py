"""Samplers whose every number is known, as traces."""

from __future__ import annotations

import torch

from dit_accel.quality.trace import Trace, TracedCall

BRANCHES = ("cond", "uncond")


def affine_trace(steps: int = 12, slope: float = -1.3, seed: int = 0, shift: float = 0.0) -> Trace:
    """An Euler sampler in sigma from 1 to 0 whose model gives ``slope * x + b``, with another b for each branch."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 6, generator=rng)
    offsets = {branch: torch.randn(1, 4, 6, generator=rng) for branch in BRANCHES}
    sigmas = [1 - (s / steps) ** (1 + shift) for s in range(steps + 1)]
    calls = []
    for step in range(steps):
        outputs = {branch: slope * x + offset for branch, offset in offsets.items()}
        for branch, output in outputs.items():
            calls.append(TracedCall(step, branch, "transformer", sigmas[step], 1000 * sigmas[step], x, output))
        x = x + (sigmas[step + 1] - sigmas[step]) * outputs["cond"]
    strides = tuple(sigmas[s] - sigmas[s + 1] for s in range(steps))
    return Trace(tuple(calls), steps, strides, (1, 2, 3), float(x.square().mean().sqrt()))


def line_trace(steps: int = 10, along: str = "step") -> Trace:
    """Outputs on a line through the steps or through the noise levels, whatever the latents are."""
    rng = torch.Generator().manual_seed(1)
    start, slope = torch.randn(1, 4, 6, generator=rng), torch.randn(1, 4, 6, generator=rng)
    sigmas = [(1 - s / steps) ** 2 for s in range(steps)]
    calls = []
    for step in range(steps):
        place = step if along == "step" else sigmas[step]
        for branch in BRANCHES:
            x = torch.randn(1, 4, 6, generator=rng)
            calls.append(TracedCall(step, branch, "transformer", sigmas[step], None, x, start + place * slope))
    return Trace(tuple(calls), steps, (1 / steps,) * steps, (1, 2, 3))


def two_experts(trace: Trace, boundary: int) -> Trace:
    """The same run with another expert from a step on."""
    calls = tuple(
        TracedCall(c.step, c.branch, "transformer" if c.step < boundary else "transformer_2", c.sigma, c.timestep,
                   c.latents, c.output)
        for c in trace.calls
    )  # fmt: skip
    return Trace(calls, trace.steps, trace.strides, trace.grid, trace.extent)
