"""What an acceleration did: which sites ran sparse, how dense their plans were, and what fell back and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .caching.report import CacheReport
    from .timing import TimeReport


@dataclass
class SiteReport:
    """The calls of one attention module since the acceleration was installed.

    Attributes:
        path: name of the module in its root, with the expert before a colon.
        kind: ``"self"``, ``"cross"`` and so on.
        sparse_calls: calls that followed a plan.
        dense_calls: calls that ran the model's own attention.
        kept: sum over all calls of the kept share of (query, key) pairs; a dense call counts 1.
    """

    path: str
    kind: str
    sparse_calls: int = 0
    dense_calls: int = 0
    kept: float = 0.0


@dataclass(frozen=True)
class ChoiceReport:
    """What ``attention="auto"`` chose at the start of the latest generation.

    Attributes:
        method: its name, or ``"dense"``.
        reason: why.
        recipe: the method with its settings, as text; None if dense.
        preset: name and source of the preset that settings come from; None without one.
    """

    method: str
    reason: str
    recipe: str | None
    preset: str | None


@dataclass
class Report:
    """See :meth:`dit_accel.Acceleration.report`.

    Attributes:
        method: the recipe, as text, or None if only controls or hooks are installed.
        backend: kernel backend of the sparse calls, None without a method.
        backend_reason: why this backend.
        plan_density: kept share of (query, key) pairs in the plans in use, in (0, 1], or of a dynamic method over its
            sparse calls; None before the first.
        steps: sampling steps seen in the latest generation.
        sites: one entry per attention module the method applies to.
        fallbacks: site path to reason, for calls that should have been sparse and ran dense.
        preset: name and source of the preset that settings come from, and which of them were given otherwise; None
            without one.
        choices: what was chosen for each expert, if the choice was left open.
        caches: what each cache did.
        timing: where the time of the model went, if it was taken.
        step_densities: expert to branch to step: kept share of (query, key) pairs in that call of the model, over the
            method's sites that ran; of the latest generation.
    """

    method: str | None
    backend: str | None
    backend_reason: str
    plan_density: float | None
    steps: int
    sites: list[SiteReport] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    choices: dict[str, ChoiceReport] = field(default_factory=dict)
    caches: list[CacheReport] = field(default_factory=list)
    timing: TimeReport | None = None
    step_densities: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Kept share of (query, key) pairs over all calls of the method's sites, dense ones included; 1 before any."""
        calls = sum(site.sparse_calls + site.dense_calls for site in self.sites)
        return sum(site.kept for site in self.sites) / calls if calls else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        more = {
            "density": self.density,
            "caches": [cache.to_dict() for cache in self.caches],
            "timing": None if self.timing is None else self.timing.to_dict(),
            "predicted_speedup": self.predicted_speedup,
        }
        return asdict(self) | more

    @property
    def predicted_speedup(self) -> float | None:
        """Of all caches and sparse attention together, over dense computation of everything; None if not known."""
        if not self.caches:
            return None
        from .caching.report import combined_speedup

        return combined_speedup([cache.speed for cache in self.caches])

    def picture(self) -> str:
        """The schedule of the latest generation as SVG: what was computed and reused at each step, and how densely.

        Raises:
            ValueError: if there is no cache, or the model has not been called yet.
        """
        from .caching.picture import schedule_svg

        return schedule_svg(self.caches)

    def summary(self) -> str:
        """A few lines for people."""
        sparse = sum(site.sparse_calls for site in self.sites)
        dense = sum(site.dense_calls for site in self.sites)
        lines = [f"method: {self.method or 'none'}"]
        if self.sites or not self.caches:  # without a method, a cache has no calls to count
            lines += [
                f"attention calls: {sparse} sparse, {dense} dense, at {len(self.sites)} sites",
                f"kept pairs: {self.density:.1%} over all calls"
                + (f", {self.plan_density:.1%} in the plan" if self.plan_density is not None else ""),
            ]
        if self.preset:
            lines.append(f"preset: {self.preset}")
        for expert, choice in self.choices.items():
            lines += [f"chosen for {expert}: {choice.recipe or choice.method}", f"because: {choice.reason}"]
            lines += [f"preset: {choice.preset}"] if choice.preset else []
        for cache in self.caches:
            lines += cache.lines()
        if len(self.caches) > 1 and self.predicted_speedup is not None:
            lines.append(f"all caches together: predicted speed-up {self.predicted_speedup:.2f}x")
        if self.timing is not None:
            lines.append(self.timing.summary())
        if self.backend:
            lines.append(f"backend: {self.backend} ({self.backend_reason})")
        lines += [f"FALLBACK {path}: {reason}" for path, reason in self.fallbacks.items()]
        return "\n".join(lines)
