"""ProfilingDiT (arXiv 2504.03140): background blocks are reused, foreground blocks always run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..limits import Limits
from ..policies.base import Judge, Moment, Policy
from ..profiling.profile import BlockProfile, load_profile
from ..profiling.published import DENSE_STEPS, INTERVAL, PUBLISHED, Published, published, published_for
from ..profiling.schedule import Schedule, schedule_of
from ..recipe import Cache
from ..scopes.base import RootView, Scope
from ..scopes.blocks import Runs
from ..unit import Unit

Background = str | Path | BlockProfile | Published | Iterable[int]


@dataclass(frozen=True)
class ProfiledRuns(Scope):
    """Background blocks of a certain model, in maximal runs; refuses any other model.

    Attributes:
        blocks: indices of the background blocks.
        made_for: the profile or published list they are from; None for any model.
    """

    blocks: tuple[int, ...]
    made_for: BlockProfile | Published | None = None

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`.

        Raises:
            ValueError: if the blocks were found for another model.
        """
        _check(self.made_for, view)
        boundary = self.made_for.boundary if isinstance(self.made_for, Published) else None
        if boundary is None:
            return Runs(self.blocks).units(view)
        parts = [[block for block in self.blocks if (block < boundary) is first] for first in (True, False)]
        return tuple(unit for part in parts if part for unit in Runs(tuple(part)).units(view))


@dataclass(frozen=True)
class PerStack(Policy):
    """Two stacks of blocks, each with a policy of its own that follows a list of steps.

    Attributes:
        first: of the units before the boundary.
        rest: of the others.
        boundary: index of the first block of the second stack.
    """

    moment: ClassVar[Moment] = Moment.UNIT
    first: Policy
    rest: Policy
    boundary: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "can_tighten", self.first.can_tighten or self.rest.can_tighten)

    def judge(self, unit: Unit, steps: int | None) -> Judge:
        """See :meth:`Policy.judge`."""
        return (self.first if unit.first < self.boundary else self.rest).judge(unit, steps)


def profiling(
    background: Background | None = None,
    *,
    schedule: Schedule | None = None,
    dense_steps: int = DENSE_STEPS,
    interval: int = INTERVAL,
    budget: float | None = None,
    root: Any = None,
) -> Cache:
    """Reuses what the background blocks add, one residual for each run of consecutive ones.

    Args:
        background: block indices; a :class:`~dit_accel.caching.profiling.BlockProfile` or the path of its file; or
            the name of a published list: ``"wan2.1-14b"``, ``"hunyuan-video"``. None: the published list for ``root``.
        schedule: when the background is computed: ``"uniform"``, ``"shrinking"``, a list of steps, or a policy. None:
            that of the published list, else uniform.
        dense_steps: first steps that are computed in full.
        interval: of the uniform schedule.
        budget: part of the blocks to take from a profile instead of its own choice, in (0, 1).
        root: the transformer, when the preset is chosen by name.

    Raises:
        ValueError: for settings out of range, an unknown name, or a list for another model.
    """
    source = _source(background, root)
    if budget is not None:
        if not isinstance(source, BlockProfile):
            raise ValueError("budget chooses among the blocks of a profile; give a profile, or leave budget out")
        source = source.with_budget(budget)
    times: dict[str, Any] = {"dense_steps": dense_steps, "interval": interval}
    policy = schedule_of("uniform" if schedule is None else schedule, **times)
    limits = Limits(0 if isinstance(schedule, Policy) else dense_steps)  # which sparse attention then shares
    if isinstance(source, tuple):
        return Cache(Runs(source), policy, limits=limits, name="profiling")
    if schedule is None and isinstance(source, Published) and source.computed is not None:
        assert source.boundary is not None
        policy = PerStack(policy, schedule_of("shrinking", **times), source.boundary)
    return Cache(ProfiledRuns(source.blocks, source), policy, limits=limits, name="profiling")


def _source(background: Background | None, root: Any) -> BlockProfile | Published | tuple[int, ...]:
    """What was given, read and checked."""
    if background is None:
        return _published_for(root)
    if isinstance(background, (BlockProfile, Published)):
        return background
    if isinstance(background, str) and background in PUBLISHED:
        return published(background)
    if isinstance(background, (str, Path)):
        if not str(background).endswith(".json"):
            return published(str(background))  # says which there are
        return load_profile(background)
    blocks = tuple(background)
    if not blocks or any(isinstance(block, bool) or not isinstance(block, int) or block < 0 for block in blocks):
        raise ValueError(f"background blocks are indices from 0, at least one; got {list(blocks)}")
    return blocks


def _published_for(root: Any) -> Published:
    name = None
    if root is not None:
        from ..profiling.blocks import block_paths

        name = published_for(type(root).__name__, len(block_paths(root)))
    if name is None:
        raise ValueError(
            "the preset profiling needs background=...: a list of blocks, a file of dit-accel profile-blocks, or the "
            f"name of a published list ({', '.join(PUBLISHED)})"
        )
    return published(name)


def _check(made_for: BlockProfile | Published | None, view: RootView) -> None:
    if isinstance(made_for, BlockProfile):
        made_for.check(view.root, len(view.blocks))
    if isinstance(made_for, Published):
        is_kind = any(base.__name__ == made_for.root_class for base in type(view.root).__mro__)
        if not is_kind or len(view.blocks) != made_for.layers:
            raise ValueError(
                f"the published list is for a {made_for.root_class} of {made_for.layers} blocks ({made_for.source}), "
                f"and this is a {view.name} of {len(view.blocks)}; profile this model with dit-accel profile-blocks"
            )
