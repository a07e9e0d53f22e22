"""Policies made of policies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..unit import Unit
from .base import Judge, Moment, Policy, Sight

_ORDER = (Moment.CALL, Moment.INPUT, Moment.PROBE, Moment.UNIT)


@dataclass(frozen=True)
class _Combination(Policy):
    """Several policies, all asked at every step so that what they sum up stays right.

    Each part that looks at tensors waits for the device once for a decision.

    Attributes:
        parts: the policies.
    """

    parts: tuple[Policy, ...]

    def __post_init__(self) -> None:
        if not self.parts or not all(isinstance(part, Policy) for part in self.parts):
            raise ValueError(f"{type(self).__name__} combines one or more policies; got {self.parts!r}")
        latest = max((part.moment for part in self.parts), key=_ORDER.index)
        looking = {_sees(part) for part in self.parts if part.moment is not Moment.CALL}
        if len(looking) > 1:
            raise ValueError(
                "policies can be combined if those that look inside the model look at the same thing: one moment, one "
                f"number of probe blocks, one modulated input; got {', '.join(map(repr, self.parts))}"
            )
        needs_output = any(part.needs_output for part in self.parts)
        if needs_output and latest is not Moment.CALL:
            raise ValueError("policies that need the model's output combine with others at Moment.CALL only")
        object.__setattr__(self, "moment", latest)
        object.__setattr__(self, "probe_blocks", max(part.probe_blocks for part in self.parts))
        object.__setattr__(self, "signal", next((part.signal for part in self.parts if part.moment is latest), ""))
        object.__setattr__(self, "needs_output", needs_output)
        object.__setattr__(self, "can_tighten", any(part.can_tighten for part in self.parts))

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        return CombinedJudge([part.judge(unit, steps) for part in self.parts], self._rule())

    def judges(self, units: Sequence[Unit], steps: int | None) -> tuple[Judge, ...]:
        """See :meth:`Policy.judges`."""
        by_part = [part.judges(units, steps) for part in self.parts]
        return tuple(CombinedJudge(of_unit, self._rule()) for of_unit in zip(*by_part, strict=True))

    @abstractmethod
    def _rule(self) -> Callable[[Iterable[bool]], bool]:
        """``all`` or ``any``, over which parts want to compute."""


@dataclass(frozen=True)
class AllOf(_Combination):
    """Computes where all parts want to compute, and reuses where any part does."""

    def _rule(self) -> Callable[[Iterable[bool]], bool]:
        return all


@dataclass(frozen=True)
class AnyOf(_Combination):
    """Computes where any part wants to compute, and reuses where all parts do."""

    def _rule(self) -> Callable[[Iterable[bool]], bool]:
        return any


class CombinedJudge(Judge):
    """Asks all its judges; its value is that of the first one whose answer was the outcome and that has one.

    Args:
        judges: one of each part.
        rule: ``all`` or ``any``, over whether they want to compute.
    """

    def __init__(self, judges: Sequence[Judge], rule: Callable[[Iterable[bool]], bool]) -> None:
        self.judges, self._rule = tuple(judges), rule

    @property
    def kept_bytes(self) -> int:
        """See :attr:`Judge.kept_bytes`; those of all parts."""
        return sum(judge.kept_bytes for judge in self.judges)

    def wants_compute(self, sight: Sight) -> bool:
        """See :meth:`Judge.wants_compute`."""
        answers = [judge.wants_compute(sight) for judge in self.judges]
        outcome = self._rule(answers)
        agreeing = [judge for judge, answer in zip(self.judges, answers, strict=True) if answer is outcome]
        telling = next((judge for judge in agreeing if judge.value is not None), None)
        self.value, self.threshold = (telling.value, telling.threshold) if telling is not None else (None, None)
        return outcome

    def note(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """See :meth:`Judge.note`."""
        for judge in self.judges:
            judge.note(sight, computed, output)

    def tighten(self, factor: float) -> None:
        """Tightens every part that has a threshold.

        Raises:
            NotImplementedError: if none has.
        """
        tightened = 0
        for judge in self.judges:
            try:
                judge.tighten(factor)
                tightened += 1
            except NotImplementedError:
                continue
        if not tightened:
            raise NotImplementedError("none of the combined policies has a threshold to tighten")


def _sees(policy: Policy) -> tuple[Moment, int, str]:
    return policy.moment, policy.probe_blocks, policy.signal if policy.moment is Moment.INPUT else ""
