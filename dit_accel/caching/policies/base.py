"""What a caching policy is: a rule that says, call by call, whether to compute or to reuse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import Tensor

from ..unit import Unit


class Moment(Enum):
    """When in a call of the root model a policy can decide.

    Attributes:
        CALL: before the root runs; its latents and timestep are known. Output scopes need this one.
        INPUT: when the first block is entered; the modulated input of that block is known.
        PROBE: after the first ``probe_blocks`` blocks, which therefore always run; what they added is known.
        UNIT: when a unit itself is entered, for each unit by itself; its input is known.
    """

    CALL = "call"
    INPUT = "input"
    PROBE = "probe"
    UNIT = "unit"


@dataclass(frozen=True)
class Sight:
    """What a judge sees when it decides about a call, and again when it is told the outcome.

    Attributes:
        step: index of the sampling step, from 0.
        steps: number of sampling steps; None where nobody says.
        branch: branch of guidance.
        expert: attribute name of the root in its pipeline.
        unit: what would be skipped; for decisions about a whole call its first unit.
        sigma: noise level of the step (:class:`dit_accel.noise.Level`), None where the scheduler says none.
        timestep: value of the root's ``timestep`` argument, None if there is none.
        latents: the root's main input ``x_s``.
        signal: at INPUT the modulated input of the first block, at PROBE what the first blocks added to its input, at
            UNIT the input of the unit; None at CALL.
        computed_step: the latest step that was computed; None before the first.
        tokens: at PROBE what the first block was given, ``[batch, tokens, channels]``; None at other moments.
        grid: frames, height and width of the token grid; None where the caller does not say.
        flow: whether that is a level of flow matching, from 0 to 1.
    """

    step: int
    steps: int | None
    branch: str
    expert: str
    unit: Unit
    sigma: float | None
    timestep: float | None
    latents: Tensor
    signal: Tensor | None
    computed_step: int | None
    tokens: Tensor | None = None
    grid: tuple[int, int, int] | None = None
    flow: bool = True


class Judge(ABC):
    """A policy at work on one expert, branch and unit for one generation; the only part that has state."""

    #: The number that the latest decision was taken by, for the report; None if the rule has none.
    value: float | None = None
    #: What that number is compared with, if anything.
    threshold: float | None = None

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors among its attributes, alone or in tuples, for the report; each counts once."""
        values = (value if isinstance(value, tuple) else (value,) for value in vars(self).values())
        found = {id(part): part for value in values for part in value if isinstance(part, Tensor)}
        return sum(part.nbytes for part in found.values())

    @abstractmethod
    def wants_compute(self, sight: Sight) -> bool:
        """Whether the call is to be computed. Not asked where limits decide. May wait for the device, once."""

    @abstractmethod
    def note(self, sight: Sight, computed: bool, output: Tensor | None) -> None:
        """Told after every call, asked or not, how it went.

        Args:
            sight: as for :meth:`wants_compute`; the engine gives it also where limits decided.
            computed: whether the unit was computed.
            output: the root's main output (computed or predicted), which policies at CALL may need; None otherwise.
        """

    def tighten(self, factor: float) -> None:
        """Makes the rule stricter for the rest of the generation, after an audit found it too generous.

        Args:
            factor: in (0, 1); what a threshold is multiplied by.
        """
        raise NotImplementedError(f"{type(self).__name__} has no threshold to tighten")


class Policy(ABC):
    """A rule and its settings: an immutable recipe that makes a :class:`Judge` for whatever it is to judge.

    Attributes:
        moment: when it can decide.
        probe_blocks: for PROBE, how many blocks run first.
        signal: for INPUT, which of the family's modulated inputs it looks at (``Family.modulated``).
        needs_output: whether its judges want the root's output in :meth:`Judge.note`.
        can_tighten: whether its judges have a threshold that an audit can tighten.
    """

    moment: ClassVar[Moment] = Moment.CALL
    probe_blocks: int = 0
    signal: str = "default"
    needs_output: bool = False
    can_tighten: bool = True

    @abstractmethod
    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """A fresh judge for one expert, branch and unit, at the start of a generation of ``steps`` steps.

        Raises:
            ValueError: if the policy was made for another number of steps, saying what to do.
        """

    def judges(self, units: Sequence[Unit], steps: int | None) -> tuple[Judge, ...]:
        """Fresh judges for all units of one expert and branch, which may share what they see; see :meth:`judge`.

        Args:
            units: in the order in which they run.
            steps: number of sampling steps; None where nobody says.
        """
        return tuple(self.judge(unit, steps) for unit in units)

    def __and__(self, other: Policy) -> Policy:
        """Computes where both want to compute."""
        from .combine import AllOf

        return AllOf((self, other))

    def __or__(self, other: Policy) -> Policy:
        """Computes where one of both wants to compute."""
        from .combine import AnyOf

        return AnyOf((self, other))
