"""Policies that let the first blocks run and look at how much they changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..unit import Unit
from .base import Judge, Moment, Policy, Sight
from .measure import check_count, check_threshold, keep, relative_change
from .threshold import ThresholdJudge, signal_of

_Against = Literal["computed", "previous"]
_Of = Literal["added", "output", "excess"]


@dataclass(frozen=True)
class ProbeDiff(Policy):
    """Reuses while the relative change of the probe stays below a threshold.

    With ``rel(a, b) = mean|a - b| / mean|b|``: FBCache and DBCache reuse iff ``rel(r_s, r_c) < threshold``, where
    ``r`` is what the first blocks add, now and at the latest computed step. DiCache (arXiv 2508.17356) sums the change
    of the probe's output against the step before, and starts anew when it computes.

    Attributes:
        threshold: the change from which on it computes; 0 computes always.
        blocks: how many blocks are the probe, from 1.
        against: ``"computed"``, the latest computed step, or ``"previous"``, the step before.
        accumulate: whether changes are summed since the latest computed step.
        of: ``"added"``, what the blocks added; ``"output"``, the tokens behind them; ``"excess"``, how much more the
            relative change of these is than that of the tokens before them, or less (absolute).
    """

    moment: ClassVar[Moment] = Moment.PROBE

    threshold: float
    blocks: int = 1
    against: _Against = "computed"
    accumulate: bool = False
    of: _Of = "added"

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)
        check_count("blocks", self.blocks)
        if self.against not in ("computed", "previous"):
            raise ValueError(f'against is "computed" or "previous"; got {self.against!r}')
        if self.of not in ("added", "output", "excess"):
            raise ValueError(f'of is "added", "output" or "excess"; got {self.of!r}')
        object.__setattr__(self, "probe_blocks", self.blocks)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        return _ProbeJudge(self)


class _ProbeJudge(ThresholdJudge):
    def __init__(self, policy: ProbeDiff) -> None:
        super().__init__(policy.threshold)
        self.policy = policy
        self._seen: tuple[Tensor, ...] | None = None

    def measure(self, sight: Sight) -> float | None:
        """See :meth:`ThresholdJudge.measure`."""
        now, before = self._look(sight), self._seen
        if before is None or any(a.shape != b.shape for a, b in zip(now, before, strict=True)):
            return None
        changes = [relative_change(a, b) for a, b in zip(now, before, strict=True)]
        change = float(changes[0] if len(changes) == 1 else (changes[0] - changes[1]).abs())
        if self.policy.accumulate:
            self.accumulated += change
            return self.accumulated
        return change

    def remember(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`ThresholdJudge.remember`."""
        if computed or self.policy.against == "previous":
            self._seen = tuple(keep(part) for part in self._look(sight))

    def _look(self, sight: Sight) -> tuple[Tensor, ...]:
        """What is compared: the probe, and for the excess also the tokens that entered it."""
        added = signal_of(sight)
        if self.policy.of == "added":
            return (added,)
        if sight.tokens is None:
            raise ValueError(f'of={self.policy.of!r} needs the tokens that enter the probe; take of="added"')
        after = torch.add(sight.tokens, added)
        return (after,) if self.policy.of == "output" else (after, sight.tokens)
