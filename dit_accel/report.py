"""What an acceleration did: which sites ran sparse, how dense their plans were, and what fell back and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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

    @property
    def density(self) -> float:
        """Kept share of (query, key) pairs over all calls of the method's sites, dense ones included; 1 before any."""
        calls = sum(site.sparse_calls + site.dense_calls for site in self.sites)
        return sum(site.kept for site in self.sites) / calls if calls else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"density": self.density}

    def summary(self) -> str:
        """A few lines for people."""
        sparse = sum(site.sparse_calls for site in self.sites)
        dense = sum(site.dense_calls for site in self.sites)
        lines = [
            f"method: {self.method or 'none'}",
            f"attention calls: {sparse} sparse, {dense} dense, at {len(self.sites)} sites",
            f"kept pairs: {self.density:.1%} over all calls"
            + (f", {self.plan_density:.1%} in the plan" if self.plan_density is not None else ""),
        ]
        if self.preset:
            lines.append(f"preset: {self.preset}")
        for expert, choice in self.choices.items():
            lines += [f"chosen for {expert}: {choice.recipe or choice.method}", f"because: {choice.reason}"]
            lines += [f"preset: {choice.preset}"] if choice.preset else []
        if self.backend:
            lines.append(f"backend: {self.backend} ({self.backend_reason})")
        lines += [f"FALLBACK {path}: {reason}" for path, reason in self.fallbacks.items()]
        return "\n".join(lines)
