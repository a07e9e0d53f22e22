"""How much memory a cache is going to take, and what gives way when there is less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..predictors.base import Predictor
from .codec import Codec, ValueSpec, why_no_fp8


@dataclass(frozen=True)
class Demand:
    """What a generation wants kept.

    Attributes:
        values: size of one value for each unit and each of its streams.
        predictor: says how many of each are kept.
        device: where they are made.
        branches: how many branches of guidance are kept apart.
        probes: size of the probes kept with them, once per branch and step, if the predictor asks for probes.
    """

    values: tuple[ValueSpec, ...]
    predictor: Predictor
    device: torch.device
    branches: int = 1
    probes: tuple[ValueSpec, ...] = ()

    @classmethod
    def of(
        cls,
        values: Tensor | tuple[Tensor, ...],
        predictor: Predictor,
        units: int = 1,
        branches: int = 1,
        probe: Tensor | None = None,
    ) -> Demand:
        """From the first value that was computed.

        Args:
            values: one tensor for each stream of the unit.
            predictor: of the recipe.
            units: how many units of that size there are.
            branches: as above.
            probe: what the first blocks added, if it is kept.
        """
        streams = (values,) if isinstance(values, Tensor) else values
        probes = (ValueSpec.of(probe),) if probe is not None and predictor.needs_probe else ()
        specs = tuple(ValueSpec.of(stream) for stream in streams) * units
        return cls(specs, predictor, streams[0].device, branches, probes)

    def estimate(self, predictor: Predictor | None = None, codec: Codec = "plain") -> Estimate:
        """What it takes, exactly: tensor sizes x units x streams x branches x depth."""
        used = predictor or self.predictor
        probes = self.probes if used.needs_probe else ()
        values = tuple(spec.nbytes(codec) for spec in self.values)
        return Estimate(values, tuple(spec.nbytes(codec) for spec in probes), used.depth, self.branches)


@dataclass(frozen=True)
class Estimate:
    """Memory that a cache takes; ``str()`` of it is what to print before a run.

    Attributes:
        values: bytes of one value of each unit and stream.
        probes: bytes of one probe.
        depth: how many of each are kept.
        branches: how many branches are kept apart.
    """

    values: tuple[int, ...]
    probes: tuple[int, ...]
    depth: int
    branches: int

    @property
    def bytes(self) -> int:
        """In all."""
        return self.branches * self.depth * (sum(self.values) + sum(self.probes))

    @property
    def working(self) -> int:
        """What one prediction needs at hand: every kept value of the largest unit, and its probes."""
        return self.depth * (max(self.values, default=0) + sum(self.probes))

    def __str__(self) -> str:
        parts = [_several(self.values, self.depth, "value"), _several(self.probes, self.depth, "probe")]
        branches = f"{self.branches} branch{'es' if self.branches != 1 else ''}"
        return f"about {size_text(self.bytes)}: {branches} x {' and '.join(filter(None, parts))}"


@dataclass(frozen=True)
class StorePlan:
    """How values are kept, for one generation.

    Attributes:
        predictor: the rule to predict with; of a lower order than the recipe's where memory asked for it.
        codec: ``"plain"`` or ``"fp8"``.
        device: where values lie between two uses: that of the model, or the CPU.
        bytes: what they take in all once everything is kept.
        device_bytes: the part of it on the model's device; for values in main memory what one prediction brings back.
    """

    predictor: Predictor
    codec: Codec
    device: torch.device
    bytes: int
    device_bytes: int

    @property
    def depth(self) -> int:
        """How many values of each unit are kept."""
        return self.predictor.depth


def size_text(count: float) -> str:
    """Bytes with a unit that suits, such as ``"196 MiB"``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def make_plan(demand: Demand, max_bytes: int | None) -> tuple[StorePlan, list[str]]:
    """How to keep what a generation wants within a bound, and what had to give way.

    In this order, until it fits: fewer values (:meth:`Predictor.lowered`), 8-bit numbers, main memory. Every step
    stays in force when the next one is taken.

    Args:
        demand: what is wanted.
        max_bytes: bound on the model's device (main memory for a model on the CPU); None for none.

    Returns:
        the plan, and one line for each step: what and why, also for those that had to be left out.

    Raises:
        ValueError: if nothing helps, naming a bound that would do.
    """
    plan = _plan(demand, demand.predictor, "plain", demand.device)
    notes: list[str] = []
    if max_bytes is None or plan.device_bytes <= max_bytes:
        return plan, notes
    tightest = plan
    for candidate, note in _chain(demand, plan, max_bytes):
        notes.append(note)
        tightest = candidate or tightest
        if candidate is not None and candidate.device_bytes <= max_bytes:
            return candidate, notes
    raise ValueError(
        f"max_bytes={max_bytes} ({size_text(max_bytes)}) is too little for this cache, which wants "
        f"{demand.estimate()}; {'; '.join(notes)}; max_bytes={tightest.device_bytes} would do, or take the scope that "
        "keeps the output of the model instead, whose values are far smaller"
    )


def _chain(demand: Demand, plan: StorePlan, max_bytes: int) -> Iterator[tuple[StorePlan | None, str]]:
    """The steps down; a step that had to be left out comes as None."""
    bound = f"max_bytes={max_bytes}"
    while (lower := plan.predictor.lowered()) is not None:
        why = f"{size_text(plan.device_bytes)} would exceed {bound}"
        note = f"depth {plan.depth} -> {lower.depth} ({lower!r} stands in for {plan.predictor!r}): {why}"
        plan = _plan(demand, lower, plan.codec, plan.device)
        yield plan, note
    obstacle = next(filter(None, (why_no_fp8(spec, demand.device) for spec in _specs(demand, plan))), None)
    if obstacle is not None:
        yield None, f"8-bit numbers were left out: {obstacle}"
    else:
        note = f"8-bit numbers, one scale per token: {size_text(plan.device_bytes)} would exceed {bound}"
        plan = _plan(demand, plan.predictor, "fp8", plan.device)
        yield plan, note
    if demand.device.type == "cpu":
        yield None, "main memory was left out: the model is there already"
    else:
        note = f"kept in main memory: {size_text(plan.device_bytes)} would exceed {bound}"
        yield _plan(demand, plan.predictor, plan.codec, torch.device("cpu")), note


def _plan(demand: Demand, predictor: Predictor, codec: Codec, device: torch.device) -> StorePlan:
    kept = demand.estimate(predictor, codec)
    stays = device == demand.device
    plan = StorePlan(predictor, codec, device, kept.bytes, kept.bytes if stays else 0)
    return plan if stays else replace(plan, device_bytes=kept.working)


def _specs(demand: Demand, plan: StorePlan) -> tuple[ValueSpec, ...]:
    return demand.values + (demand.probes if plan.predictor.needs_probe else ())


def _several(sizes: tuple[int, ...], depth: int, name: str) -> str:
    """Such as ``"3 values of 196 MiB"``; empty for nothing."""
    if not sizes:
        return ""
    count = len(sizes) * depth
    smallest, largest = size_text(min(sizes)), size_text(max(sizes))
    each = largest if smallest == largest else f"{smallest} to {largest}"
    return f"{count} {name}{'s' if count != 1 else ''} of {each}"
