"""Step computation masks, as published with cache-dit 1.5 for 28 steps and for few-step models, and for other counts.

A mask alternates runs of computed steps and of steps that may be reused; a row here lists the lengths of these runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..unit import Unit
from .base import Judge, Policy
from .static import StaticJudge

_BASE = 28
_Runs = tuple[tuple[int, ...], tuple[int, ...]]  # lengths of computed runs, lengths of the reused runs between them

_28_STEPS: dict[str, _Runs] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
_15_STEPS: dict[str, _Runs] = {
    "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
    "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
    "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
    "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
}
_9_STEPS: dict[str, _Runs] = {
    "slow": ((5, 2, 1), (1,)),
    "medium": ((5, 1, 1), (1, 1)),
    "fast": ((4, 1, 1), (1, 2)),
    "ultra": ((3, 1, 1), (2, 2)),
}
_8_STEPS: dict[str, _Runs] = {
    "slow": ((5, 1, 1), (1,)),
    "medium": ((4, 1, 1), (1, 1)),
    "fast": ((3, 1, 1), (1, 2)),
    "ultra": ((2, 1, 1), (2, 2)),
}
_6_STEPS: _Runs = ((3, 1), (2,))
_4_STEPS: _Runs = ((2, 1), (1,))

#: Names of the masks, from the one that computes most.
SCM_MASKS = tuple(_28_STEPS)


def scm_mask(name: str, steps: int) -> tuple[bool, ...]:
    """Which steps a named mask of cache-dit computes; the last one always.

    Args:
        name: ``"slow"``, ``"medium"``, ``"fast"`` or ``"ultra"``.
        steps: number of sampling steps: 4, 6, or 8 and more.

    Raises:
        ValueError: for other names and numbers.
    """
    if name not in SCM_MASKS:
        raise ValueError(f"no step mask is called {name!r}; there are {', '.join(SCM_MASKS)}")
    computed, reused = _runs(name, steps)
    flags: list[bool] = []
    for index, length in enumerate(computed):
        flags += [True] * length
        if index < len(reused):
            flags += [False] * reused[index]
    for length in reused[len(computed) :]:
        flags += [False] * length
    return (*flags[: steps - 1], True)


def _runs(name: str, steps: int) -> tuple[list[int], list[int]]:
    if steps in (4, 6):
        chosen = _4_STEPS if steps == 4 else _6_STEPS
    elif steps < 8:
        raise ValueError(f"step masks exist for 4, 6, and from 8 steps on; got {steps}")
    elif steps < 16:
        chosen = {8: _8_STEPS, 9: _9_STEPS}.get(steps, _15_STEPS)[name]
    else:
        chosen = _28_STEPS[name]
    computed, reused = list(chosen[0]), list(chosen[1])
    if steps > _BASE:
        _stretch(computed, reused, steps)
    _cut(computed, reused, steps)
    return computed, reused


def _stretch(computed: list[int], reused: list[int], steps: int) -> None:
    """Lengthens the runs in turn, each by half of what its share of the steps would be, until they reach ``steps``."""
    scale = steps / _BASE * 0.5
    more_computed = [max(int(length * scale), 1) for length in computed]
    more_reused = [max(int(length * scale), 1) for length in reused]
    pairs = min(len(computed), len(reused))
    while True:
        for index in range(pairs):
            for runs, more in ((computed, more_computed), (reused, more_reused)):
                runs[index] += more[index]
                if sum(computed) + sum(reused) >= steps:
                    return
        computed[-1] += 1
        if sum(computed) + sum(reused) >= steps:
            return


def _cut(computed: list[int], reused: list[int], steps: int) -> None:
    """Shortens the last reused and the last computed run in turn, by one step each, down to ``steps``."""
    while sum(computed) + sum(reused) > steps:
        for runs in (reused, computed):
            if runs and sum(computed) + sum(reused) > steps:
                runs[-1] -= 1
                if runs[-1] == 0:
                    runs.pop()


@dataclass(frozen=True)
class ScmMask(Policy):
    """Follows a named mask of cache-dit, for however many steps there are.

    Attributes:
        name: ``"slow"``, ``"medium"``, ``"fast"`` or ``"ultra"``.
    """

    can_tighten = False
    name: str

    def __post_init__(self) -> None:
        scm_mask(self.name, _BASE)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`.

        Raises:
            ValueError: if nobody says how many steps there are, or there is no mask for so few.
        """
        if steps is None:
            raise ValueError(
                "a mask depends on the number of steps, and nobody says it; call clock.set_step(step, steps) before "
                "each call of the model, or give the mask itself"
            )
        return StaticJudge(scm_mask(self.name, steps).__getitem__)
