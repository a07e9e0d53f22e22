"""Collects the figures of all attention calls of a generation, by layer and step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..clock import StepState
from ..controls import AttentionCall, AttentionControl, SiteInfo
from .statistics import call_statistics

Record = dict[str, Any]
FIGURES = ("recall_10", "recall_20", "density_95", "first_frame", "same_frame", "same_position", "text")
CONCENTRATED = 0.8  # share of the mass in a head's heaviest fifth of blocks; where AdaSpa draws its line


class AttentionStatisticsRecorder(AttentionControl):
    """Measures self-attention and joint attention without keeping any map; see :func:`.call_statistics`.

    It costs a few times what dense attention costs, and changes nothing. Padding at the end, which the model's mask
    hides, is left out.

    Args:
        block: tokens per block.
        samples: how many sampling steps are recorded, spread evenly; None for all.
        kinds: kinds of sites; those the model lacks are passed over.

    Raises:
        ValueError: if a count is below 1.
    """

    def __init__(
        self, block: int = 64, *, samples: int | None = None, kinds: Collection[str] = ("self", "joint")
    ) -> None:
        super().__init__(kinds=kinds)
        for name, value in (("a block", block), ("the number of recorded steps", samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.block, self.samples = block, samples
        self._calls: dict[tuple[str, str], dict[int, list[dict[str, Tensor]]]] = {}
        self._layers: dict[tuple[str, str], tuple[AttentionCall, int]] = {}

    def acts_at(self, state: StepState) -> bool:
        """Whether a step is one of those recorded.

        Raises:
            ValueError: if only some are wanted and nobody says how many steps there are.
        """
        if self.samples is None:
            return True
        if state.steps is None:
            raise ValueError("nobody says how many steps there are; record all, or call clock.set_step(step, steps)")
        return state.step in spread(state.steps, self.samples)

    def record(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Adds the figures of one call.

        Raises:
            ValueError: if its output is not finite.
        """
        call, (query, key, value, output) = without_padding(call, query, key, value, output)
        _check_finite(call, output)
        where = (call.site.expert, call.site.path)
        self._layers[where] = (call, query.shape[1])
        measured = self.measure(call, query, key, value, output)
        figures = {name: part.cpu() for name, part in measured.items()}
        self._calls.setdefault(where, defaultdict(list))[call.state.step].append(figures)

    def measure(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> dict[str, Tensor]:
        """The figures of one call, each ``[heads, ...]``; those of all calls are averaged."""
        return call_statistics(query, key, call.layout, self.block)

    def by_layer(self) -> list[Record]:
        """One JSON-ready record per layer in execution order, averaged over heads and calls.

        ``path``, ``kind``, ``layer``, ``expert``, ``grid``, ``tokens`` (visual ones), ``blocks`` and ``heads`` say
        which and how large. The figures have the names of :func:`.call_statistics`; one that a layer lacks is None.
        ``frames`` and ``space`` hold a ``profile``, and ``rate`` and ``r_squared`` of its :func:`decay`.
        ``concentrated_heads`` counts those whose ``recall_20`` is above 0.8. ``by_head`` and ``by_step`` show how
        figures vary.
        """
        return [
            summarize(call.site, call.layout.grid, heads, self._calls[where], self.block)
            for where, (call, heads) in self._layers.items()
        ]


def without_padding(call: AttentionCall, *parts: Tensor) -> tuple[AttentionCall, list[Tensor]]:
    """A call as methods get it: without the padding at its end, which the model's mask hides from all other tokens.

    Args:
        call: where and when.
        *parts: its tensors, ``[batch, heads, tokens, head_dim]`` each.
    """
    padding = call.layout.padding
    if not padding:
        return call, list(parts)
    return replace(call, layout=replace(call.layout, padding=0)), [part[:, :, :-padding] for part in parts]


def _check_finite(call: AttentionCall, output: Tensor) -> None:
    if not torch.isfinite(output).all():
        raise ValueError(f"{call.site.path} gave NaN or infinity at step {call.state.step}; try float32 or bfloat16")


def spread(steps: int, samples: int) -> list[int]:
    """The middles of ``samples`` equal parts of all steps; every step if there are not more."""
    return [int((part + 0.5) * steps / samples) for part in range(samples)] if samples < steps else [*range(steps)]


def summarize(
    site: SiteInfo, grid: tuple[int, int, int], heads: int, steps: dict[int, list[dict[str, Tensor]]], block: int
) -> Record:
    """The record of one layer, see :meth:`AttentionStatisticsRecorder.by_layer`, from its calls' figures by step."""
    mean = mean_of([figures for calls in steps.values() for figures in calls])
    by_step = {step: mean_of(calls) for step, calls in sorted(steps.items())}
    tokens = grid[0] * grid[1] * grid[2]
    return {
        "path": site.path,
        "kind": site.kind,
        "layer": site.layer,
        "expert": site.expert,
        "grid": list(grid),
        "tokens": tokens,
        "blocks": -(-tokens // block),
        "heads": heads,
        **{name: number(mean.get(name)) for name in FIGURES},
        "concentrated_heads": int((mean["recall_20"] > CONCENTRATED).sum()) if "recall_20" in mean else None,
        **{name: decay_record(mean.get(name)) for name in ("frames", "space")},
        "by_head": {name: numbers(mean[name]) for name in FIGURES if name in mean},
        "by_step": {
            str(step): {name: number(figures.get(name)) for name in ("recall_10", "density_95")}
            for step, figures in by_step.items()
        },
    }


def decay(profile: Sequence[float]) -> tuple[float, float] | None:
    """Fits ``a * exp(-rate * distance)`` to a profile by least squares of its logarithm.

    Returns:
        rate per unit of distance and the share of the logarithm's variance explained (R squared); None below three
        positive values, and for a flat profile, which has no variance to explain.
    """
    points = [(float(distance), value) for distance, value in enumerate(profile) if value > 0]
    if len(points) < 3:
        return None
    distance, value = torch.tensor(points, dtype=torch.float64).T
    distance, height = distance - distance.mean(), value.log() - value.log().mean()
    if height.abs().max() < 1e-4:
        return None
    slope = (distance @ height) / (distance @ distance)
    return float(-slope), float(1 - ((height - slope * distance) ** 2).sum() / (height @ height))


def decay_record(profiles: Tensor | None) -> Record | None:
    """The mean over heads of ``[heads, distances]`` profiles, and its :func:`decay`."""
    if profiles is None:
        return None
    profile = profiles.mean(0).tolist()
    rate, fit = decay(profile) or (None, None)
    return {"profile": numbers(profile), "rate": rounded(rate), "r_squared": rounded(fit)}


def mean_of(calls: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each figure over calls, of which all have the same."""
    return {name: torch.stack([figures[name] for figures in calls]).mean(0) for name in calls[0]}


def number(values: Tensor | None) -> float | None:
    """The mean of a figure over heads, with four decimals."""
    return None if values is None else rounded(float(values.mean()))


def numbers(values: Tensor | Sequence[float]) -> list[float]:
    """Values with four decimals."""
    return [round(float(value), 4) for value in values]


def rounded(value: float | None) -> float | None:
    """A value with four decimals, if there is one."""
    return None if value is None else round(value, 4)
