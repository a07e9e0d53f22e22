"""What a cache remembers of one branch of guidance in one model, between calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...clock import StepState
from ..policies.base import Judge
from ..unit import Unit
from .identity import Fingerprint
from .rows import holds_both_branches

#: What a kept value must have in common with the call that reuses it.
Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether to compute, and why.

    Attributes:
        computes: whether the units of the call are computed.
        reason: one or two words for the report.
        value: the number that the policy decided by, if it was asked and has one.
        threshold: what it was compared with, if anything.
        audits: whether what is computed would have been reused, and is compared with the prediction.
    """

    computes: bool
    reason: str
    value: float | None = None
    threshold: float | None = None
    audits: bool = False


@dataclass
class Track:
    """One branch in one expert, for one generation.

    Attributes:
        generation: of the clock.
        shape: of the latents and tokens.
        prompt: what tells the prompt of the branch from another.
        last_step: of the latest call.
        computed_step: of the latest call that was computed.
        consecutive: calls reused since then.
        judges: by unit key, None for whole calls; of the branch that decides.
        unaudited: in how many calls it has decided to reuse since an audit.
    """

    generation: int
    shape: Shape
    prompt: Fingerprint
    last_step: int | None = None
    computed_step: int | None = None
    consecutive: int = 0
    judges: dict[str | None, Judge] = field(default_factory=dict)
    unaudited: int = 0

    def break_reason(self, state: StepState, shape: Shape, prompt: Fingerprint) -> str | None:
        """Why nothing kept so far may be used at a call; None if it may."""
        if state.generation != self.generation:
            return "first"
        if shape != self.shape:
            return "shape"
        if not prompt.same_as(self.prompt):
            return "prompt"
        if self.last_step is None or state.step != self.last_step + 1:
            return "jump"
        return None

    def count(self, step: int, computed: bool) -> None:
        """Takes note of a call that has ended."""
        self.last_step = step
        if computed:
            self.computed_step, self.consecutive = step, 0
        else:
            self.consecutive += 1


@dataclass
class UnitRun:
    """One unit within one call.

    Attributes:
        unit: which.
        verdict: what was decided.
        entered: its streams as they came in; empty once it is left.
        predicted: the streams of its value, where it is skipped or audited.
        is_repeated: whether it was entered before in the same call.
    """

    unit: Unit
    verdict: Verdict
    entered: tuple[Tensor | None, ...] = ()
    predicted: tuple[Tensor | None, ...] | None = None
    is_repeated: bool = False


@dataclass
class OpenCall:
    """One call of the root.

    Attributes:
        state: where in the generation it stands.
        track: of its branch.
        leader: the call of another branch that has decided this step; None where this one decides.
        arguments: of the root, bound by name.
        latents: the root's main input.
        forced: why it is computed whatever the policy says; None if nothing forces it.
        verdict: of the whole call, once it is known.
        signal: what the policy is shown.
        tokens: what entered the first block, where a probe is measured.
        probe: what the probe blocks added.
        audits: whether what it would reuse is computed and compared; None as long as nothing would be reused.
        audited: whether an audit was made in it.
        tightened: whether an audit of its step has tightened the policy.
        paired: whether its batch holds both branches of guidance; None as long as nobody asked.
        runs: units entered so far, by key.
        done: keys of units that came to their end.
    """

    state: StepState
    track: Track
    leader: OpenCall | None
    arguments: dict[str, Any]
    latents: Tensor
    forced: str | None
    verdict: Verdict | None = None
    signal: Tensor | None = None
    tokens: Tensor | None = None
    probe: Tensor | None = None
    audits: bool | None = None
    audited: bool = False
    tightened: bool = False
    paired: bool | None = None
    runs: dict[str, UnitRun] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @property
    def judges(self) -> dict[str | None, Judge]:
        """Those that decide for it."""
        return (self.leader or self).track.judges

    def is_paired(self, is_guided: bool | None) -> bool:
        """Whether its batch holds both branches of guidance; waits for the device when first asked.

        Args:
            is_guided: what the pipeline says about guidance.
        """
        if self.paired is None:
            self.paired = holds_both_branches(self.latents, is_guided)
        return self.paired

    @property
    def is_whole(self) -> bool:
        """Whether every unit that was skipped came to its end; else the model left out its last block."""
        return all(key in self.done or run.verdict.computes for key, run in self.runs.items())

    @property
    def computed_all(self) -> bool:
        """Whether no unit was skipped."""
        return all(run.verdict.computes for run in self.runs.values())

    def start_again(self, reason: str) -> None:
        """Turns a call that was reused into one that is computed."""
        self.runs.clear()
        self.done.clear()
        self.forced, self.verdict = reason, Verdict(True, reason)

    def skipped(self, block: int | None, path: str) -> bool:
        """Whether a block was skipped, by its index among all blocks, or the module at a path within it."""
        skipped = [run.unit for run in self.runs.values() if not run.verdict.computes]
        return any(unit.covers(block, path, self.state.branch) for unit in skipped)

    def release(self) -> None:
        """Lets go of the tensors of the call, once it has ended; what was decided stays."""
        self.arguments, self.latents = {}, self.latents.new_empty(0)
        self.signal = self.tokens = self.probe = None
        self.runs = {key: UnitRun(run.unit, run.verdict) for key, run in self.runs.items()}


def shape_of(latents: Tensor, state: StepState) -> Shape:
    """What kept values depend on: batch, size, precision, device and the tokens' places."""
    device = latents.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return (tuple(latents.shape), latents.dtype, device, state.layout, torch.is_grad_enabled(), autocast)
