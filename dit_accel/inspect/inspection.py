"""Measures the attention of a generation, layer by layer, and what each method would make of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from ..clock import StepState
from ..controls import AttentionCall
from ..layout import TokenLayout
from .blocks import FEWEST_BLOCKS, coarser, recall_at
from .compare import Dense, Quality, dense_attention, quality, relative_error
from .methods import Candidate
from .recorder import AttentionStatisticsRecorder, Record, decay, mean_of, numbers, rounded
from .statistics import join_heads, measured
from .thumbnails import mask_picture, mass_picture

BLOCKS = (64, 128)
DENSITIES = (0.05, 0.1, 0.2, 0.25, 0.5)
SHARES = ("first_frame", "same_frame", "same_position", "text")
DENSER = 1.2  # a method may be so much denser than asked for, and still be compared
UNLIKE = 0.02  # relative difference of the model's attention from plain softmax that 16 bits do not explain


class Pictures(NamedTuple):
    """Small pictures of a layer, averaged over calls.

    Attributes:
        mass: ``[heads, cells, cells]``, see :func:`.mass_picture`.
        masks: by method, ``[heads or 1, cells, cells]``, see :func:`.mask_picture`.
    """

    mass: Tensor
    masks: dict[str, Tensor]


class InspectionRecorder(AttentionStatisticsRecorder):
    """Measures recall, decay and shares by head, and tries methods on the queries, keys and values that it sees.

    It changes nothing. Every call that is looked at costs a few times what dense attention costs, and as much again
    for each method. Maps of all tokens exist for some queries and heads at a time only, but methods run on all heads
    in float32, so about five times the memory of a call's queries, keys and values is needed.

    Args:
        at: sampling steps to look at, from 0.
        candidates: methods to compare.
        blocks: sizes of blocks for the recall; the others are multiples of the first.
        densities: parts of all blocks for the recall, in (0, 1].

    Raises:
        ValueError: if there is nothing to look at, or a number is out of range.
    """

    def __init__(
        self,
        at: Collection[int],
        candidates: Sequence[Candidate] = (),
        *,
        blocks: Sequence[int] = BLOCKS,
        densities: Sequence[float] = DENSITIES,
    ) -> None:
        _check(at, blocks, densities)
        super().__init__(blocks[0])
        self.at, self.candidates = frozenset(at), tuple(candidates)
        self.blocks, self.densities = tuple(blocks), tuple(densities)
        self.refusals: dict[tuple[str, str, str], str] = {}  # expert, path and method: why it cannot act there

    def acts_at(self, state: StepState) -> bool:
        """Whether a step is one of those to look at."""
        return state.step in self.at

    def measure(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> dict[str, Tensor]:
        """All figures of one call, each ``[heads, ...]``."""
        parts = []
        for figures, mass in measured(query, key, call.layout, self.block):
            parts.append(figures | self._of_blocks(mass, call.layout))
        dense = dense_attention(query, key, value)
        found = join_heads(parts) | {"unlike": relative_error(output, dense.output)}
        for candidate in self.candidates:
            found |= self._of_method(candidate, call, (query, key, value), dense)
        return found

    def by_layer(self) -> list[Record]:
        """One JSON-ready record per layer in execution order; figures by head, averaged over calls.

        ``path``, ``kind``, ``layer``, ``expert``, ``grid``, ``tokens`` (visual ones), ``text_tokens`` (all others),
        ``heads``, ``steps`` and ``calls`` say what was seen. ``recall`` has a list by head for each block size and
        density, None where there are fewer than 10 blocks. ``shares`` has the ``first_frame``, ``same_frame``,
        ``same_position`` and ``text`` of :func:`.call_statistics`, None where there are no such. ``frames`` and
        ``space`` have the mean ``profile``, its fitted ``rate`` and ``r_squared``, and both by head; None without
        frames or space. ``methods`` has ``recall``, ``error`` and ``density`` by head; ``best`` the method of the
        smallest error for each head, see :func:`best_methods`; ``refused`` the methods that cannot act, with reasons.
        ``unlike`` is the largest relative difference, of any head, between the model's own attention and plain softmax
        attention: well above 0 where the model masks or scales otherwise.
        """
        return [self._record(where) for where in self._layers]

    def pictures(self) -> dict[tuple[str, str], Pictures]:
        """The pictures of each layer, by expert and path."""
        found = {}
        for where in self._layers:
            mean = self._mean(where)
            names = [c.name for c in self.candidates if f"mask of {c.name}" in mean]
            masks = {name: mean[f"mask of {name}"].float() for name in names}
            found[where] = Pictures(mean["picture"].float(), masks)
        return found

    def chosen_settings(self) -> dict[tuple[str, str], dict[str, Record]]:
        """The settings at which each method was tried, by expert and path, and by method."""
        return {
            where: {c.name: recipe.settings() for c in self.candidates if (recipe := c.chosen(call)) is not None}
            for where, (call, _) in self._layers.items()
        }

    def _of_method(
        self, candidate: Candidate, call: AttentionCall, tensors: tuple[Tensor, Tensor, Tensor], dense: Dense
    ) -> dict[str, Tensor]:
        """What one method does to a call; nothing where it cannot act, which is noted once and for all."""
        where = (call.site.expert, call.site.path, candidate.name)
        if where in self.refusals:
            return {}
        try:
            recipe, plan = candidate.plan(call, *tensors)
        except ValueError as error:
            self.refusals[where] = str(error)
            return {}
        result = quality(*tensors, plan, dense, compensate=bool(getattr(recipe, "compensate", False)))
        found = {f"{name} of {candidate.name}": part for name, part in result._asdict().items()}
        return found | {f"mask of {candidate.name}": mask_picture(plan, call.layout).half()}

    def _of_blocks(self, mass: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
        """Figures and a picture of ``[batch, heads, query blocks, key blocks]`` masses."""
        tokens = layout.visual[1] - layout.visual[0]
        found = {"picture": mass_picture(mass, tokens, self.block).half()}
        for block in self.blocks:
            coarse = mass if block == self.block else coarser(mass, tokens, self.block, block // self.block)
            if coarse.shape[-1] >= FEWEST_BLOCKS:
                found[f"recall {block}"] = recall_at(coarse, self.densities)
        return found

    def _mean(self, where: tuple[str, str]) -> dict[str, Tensor]:
        calls = [figures for step in self._calls[where].values() for figures in step]
        common = set.intersection(*(set(figures) for figures in calls))  # a method may be refused after a while
        return mean_of([{name: figures[name] for name in common} for figures in calls])

    def _record(self, where: tuple[str, str]) -> Record:
        call, heads = self._layers[where]
        mean, steps = self._mean(where), self._calls[where]
        methods = {
            candidate.name: {name: numbers(mean[f"{name} of {candidate.name}"]) for name in Quality._fields}
            for candidate in self.candidates
            if f"error of {candidate.name}" in mean
        }
        start, stop = call.layout.visual
        return {
            "path": call.site.path,
            "kind": call.site.kind,
            "layer": call.site.layer,
            "expert": call.site.expert,
            "grid": list(call.layout.grid),
            "tokens": stop - start,
            "text_tokens": call.layout.length - (stop - start),
            "heads": heads,
            "steps": sorted(steps),
            "calls": sum(len(calls) for calls in steps.values()),
            "recall": {str(block): self._recall(mean.get(f"recall {block}")) for block in self.blocks},
            "shares": {name: numbers(mean[name]) if name in mean else None for name in SHARES},
            **{name: _decay(mean.get(name)) for name in ("frames", "space")},
            "methods": methods,
            "best": best_methods(methods, heads, self.candidates[0].density if self.candidates else 1.0),
            "unlike": rounded(float(mean["unlike"].max())),
            "refused": {name: why for (*site, name), why in self.refusals.items() if tuple(site) == where},
        }

    def _recall(self, recall: Tensor | None) -> Record | None:
        if recall is None:
            return None
        return {f"{density:g}": numbers(recall[:, at]) for at, density in enumerate(self.densities)}


def best_methods(methods: dict[str, Record], heads: int, density: float) -> list[str | None]:
    """The method of the smallest output error for each head, of equal ones the first.

    Methods that cannot be as sparse as asked for in this layer, by more than a fifth, do not take part.

    Args:
        methods: ``error`` and ``density`` by head, by method.
        heads: their number.
        density: that was asked for.

    Returns:
        None for each head if no method takes part.
    """
    fair = [name for name, found in methods.items() if is_fair(found["density"], density)]
    return [min(fair, key=lambda name: methods[name]["error"][head], default=None) for head in range(heads)]


def is_fair(densities: Sequence[float], density: float) -> bool:
    """Whether the mean density of a layer's heads is at most a fifth above the one that was asked for."""
    return sum(densities) / len(densities) <= DENSER * density


def _decay(profiles: Tensor | None) -> Record | None:
    """The mean of ``[heads, distances]`` profiles, and what exponentials fit it and each head."""
    if profiles is None:
        return None
    rate, fit = _fit(profiles.mean(0))
    by_head = [_fit(profile) for profile in profiles]
    return {
        "profile": numbers(profiles.mean(0)),
        "rate": rate,
        "r_squared": fit,
        "by_head": {"rate": [rate for rate, _ in by_head], "r_squared": [fit for _, fit in by_head]},
    }


def _fit(profile: Tensor) -> tuple[float | None, float | None]:
    rate, fit = decay(profile.tolist()) or (None, None)
    return rounded(rate), rounded(fit)


def _check(at: Collection[int], blocks: Sequence[int], densities: Sequence[float]) -> None:
    if not at or min(at) < 0:
        raise ValueError(f"give sampling steps to look at, from 0; got {sorted(at)}")
    if not blocks or min(blocks) < 1 or any(block % blocks[0] for block in blocks):
        raise ValueError(f"blocks are numbers of tokens from 1, multiples of the first; got {list(blocks)}")
    if not densities or not all(0 < density <= 1 for density in densities):
        raise ValueError(f"densities are parts of all blocks, in (0, 1]; got {list(densities)}")
