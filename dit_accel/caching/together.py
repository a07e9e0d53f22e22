"""All caches of one acceleration, and what they and sparse attention owe each other.

Both warm up together. Blocks that a cache probes attend densely, or the probe would measure the change of mask. A site
that was to renew its plan in a skipped call does so at its next one. With an anchor sites that were skipped several
times in a row then keep more, since the next calls are predicted from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .engine import CacheEngine, attach
from .policies.base import Moment
from .presets import preset_by_name
from .recipe import Cache

if TYPE_CHECKING:
    from ..clock import StepClock, StepState
    from ..controls import SiteInfo
    from ..install import RootInstallation
    from ..timing import Timer
    from .unit import Unit

Undo = Callable[[], None]


@dataclass(frozen=True)
class Anchor:
    """What the first computed call after skipped ones keeps, as it is what later ones are predicted from.

    It acts on attention that is skipped with its call, not where a cache decides unit by unit.

    Attributes:
        factor: on the density of sparse attention, 1 or more.
        after: so many skipped calls in a row, 1 or more.
    """

    factor: float = 1.5
    after: int = 2

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"Anchor.factor is a factor on the density, 1 or more; got {self.factor}")
        if isinstance(self.after, bool) or not isinstance(self.after, int) or self.after < 1:
            raise ValueError(f"Anchor.after counts skipped calls, from 1; got {self.after!r}")


class Caches:
    """The caches of one acceleration; none is a fine number of them.

    Attributes:
        engines: one for each cache.
        anchor: as given.

    Args:
        recipes: outermost last: where one skips a whole call, those before it are not asked.
        clock: of the pipeline.
        anchor: see :class:`Anchor`; None for no such thing.
        timer: takes the time of their own work; None for none.
    """

    def __init__(
        self, recipes: Sequence[Cache], clock: StepClock, anchor: Anchor | None, timer: Timer | None = None
    ) -> None:
        self.engines = [CacheEngine(recipe, clock, timer) for recipe in recipes]
        for engine in self.engines:
            engine.others = tuple(other for other in self.engines if other is not engine)
        self.anchor = anchor
        self._block_of: dict[str, dict[str, int]] = {}  # by expert: index of the block that a site is in
        self._units_of: dict[tuple[str, str, str], list[tuple[CacheEngine, Unit]]] = {}  # by expert, site and branch

    def __bool__(self) -> bool:
        return bool(self.engines)

    def attach(self, installed: RootInstallation) -> list[Undo]:
        """Puts all of them on a root; returns what undoes it, to be called in reverse order."""
        blocks = [path for path, _ in installed.blocks()]
        self._block_of[installed.expert] = {
            site.info.path: index
            for site in installed.sites.values()
            for index, path in enumerate(blocks)
            if site.info.path.startswith(f"{path}.")
        }
        undo: list[Undo] = []
        for engine in self.engines:
            try:
                undo += attach(engine, installed)
            except BaseException:
                while undo:
                    undo.pop()()
                raise
        return undo

    def warm_up(self, steps: int) -> None:
        """Says how many first steps sparse attention leaves dense: nothing is reused in them either."""
        for engine in self.engines:
            engine.warmup = steps

    def keeps_dense(self, site: SiteInfo, state: StepState) -> bool:
        """Whether a site has to attend densely for the sake of a cache."""
        if any(engine.warms_up(state) for engine in self.engines):
            return True
        index = self._block_of[site.expert].get(site.path)
        return index is not None and any(
            engine.cache.policy.moment is Moment.PROBE and index < engine.cache.policy.probe_blocks
            for engine in self.engines
        )

    def density_factor(self, site: SiteInfo, state: StepState) -> float:
        """On the density of a site in the coming call, if it is computed.

        More where the calls before were skipped there. Caches that decide unit by unit ask for nothing: which units
        they skipped is not known of a call, and where they skip some in each call, there would be more in each.
        """
        if self.anchor is None:
            return 1.0
        for engine, unit in self._covering(site, state.branch):
            skipped = engine.consecutive(state)
            # What may not be skipped at this step runs in calls that are reused, too.
            if skipped >= self.anchor.after and engine.cache.scope.is_active(unit, state.step, state.steps):
                return self.anchor.factor
        return 1.0

    def _covering(self, site: SiteInfo, branch: str) -> list[tuple[CacheEngine, Unit]]:
        """The units that a site is in, of the caches that decide about whole calls; looked up once, as names are."""
        key = (site.expert, site.path, branch)
        if key not in self._units_of:
            index = self._block_of[site.expert].get(site.path)
            self._units_of[key] = [
                (engine, unit)
                for engine in self.engines
                if engine.cache.policy.moment is not Moment.UNIT
                for unit in engine.units[site.expert]
                if unit.covers(index, site.path, branch)
            ]
        return self._units_of[key]

    def skipped(self, site: SiteInfo) -> bool:
        """Whether the call that has just ended skipped the block of a site."""
        index = self._block_of.get(site.expert, {}).get(site.path)
        return any(engine.skipped(site.expert, index, site.path) for engine in self.engines)

    def forget(self) -> None:
        """Drops everything that was kept."""
        for engine in self.engines:
            engine.forget()


def recipes_of(given: Any, settings: Mapping[str, Any] | None, root: Any) -> list[Cache]:
    """What a user gave as ``cache``, as recipes.

    Args:
        given: a preset's name, a recipe, several of these, or None.
        settings: of the preset, if it is one.
        root: the model, for presets that depend on it.

    Raises:
        ValueError: for unknown names or settings, or settings for anything but one preset.
    """
    if settings and not isinstance(given, str):
        raise ValueError("cache_settings belong to one preset given by name; give them to the recipe itself")
    if given is None:
        return []
    if isinstance(given, str):
        return recipes_of(preset_by_name(given, root, settings or {}), None, root)
    if isinstance(given, Cache):
        return [given]
    if isinstance(given, Sequence):
        return [recipe for part in given for recipe in recipes_of(part, None, root)]
    raise ValueError(f"cache is a preset's name, a dit_accel.caching.Cache, or several; got {type(given).__name__}")
