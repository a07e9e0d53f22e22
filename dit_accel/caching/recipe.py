"""A cache: which parts of a model are skipped, when, and what stands in for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .limits import Limits
from .policies.base import Policy
from .predictors.base import Predictor
from .predictors.reuse import Reuse
from .scopes.base import Scope


@dataclass(frozen=True)
class Audit:
    """Checks reuse while it happens: some steps that would be reused are computed, and compared.

    The policy needs a threshold: one that follows a list of steps has nothing to tighten.

    Attributes:
        every: each so many reused steps one is computed to be compared; costs that share of what reuse saves.
        limit: relative error ``mean|predicted - computed| / mean|computed|`` above which the policy is tightened.
        factor: what thresholds are then multiplied by, for the rest of the generation.
    """

    every: int
    limit: float
    factor: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"Audit.every counts reused steps, from 1; got {self.every!r}")
        if not self.limit > 0:
            raise ValueError(f"Audit.limit is a relative error above 0, such as 0.1; got {self.limit}")
        if not 0 < self.factor < 1:
            raise ValueError(f"Audit.factor lies between 0 and 1; got {self.factor}")


@dataclass(frozen=True)
class Cache:
    """Scope x policy x predictor, with hard limits: an immutable recipe.

    ``dit_accel.accelerate(pipe, cache=Cache(...))`` puts it on a pipeline; :mod:`dit_accel.caching.presets` has those
    of the papers, also by name: ``cache="teacache"``.

    Attributes:
        scope: which parts of the model may be skipped.
        policy: when they are.
        predictor: what stands in for them; the value of the latest computed step by default.
        limits: when they are not, whatever the policy says.
        decide: ``"first"``: the first branch of a step decides for all, so that guidance never mixes ages; ``"each"``:
            every branch decides for itself.
        branches: branches that the cache acts on; None for all.
        max_bytes: bound on what is kept; None for none.
        audit: runtime check; None for none.
        name: of the preset; ``""`` for one's own.
    """

    scope: Scope
    policy: Policy
    predictor: Predictor = field(default_factory=Reuse)
    limits: Limits = field(default_factory=Limits)
    decide: Literal["first", "each"] = "first"
    branches: tuple[str, ...] | None = None
    max_bytes: int | None = None
    audit: Audit | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.decide not in ("first", "each"):
            raise ValueError(f'decide is "first" or "each"; got {self.decide!r}')
        if self.audit is not None and not self.policy.can_tighten:
            raise ValueError(
                f"{type(self.policy).__name__} has no threshold that an audit could tighten; leave audit out, or take "
                "a policy that has one"
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes is a positive number of bytes, or None for no bound; got {self.max_bytes}")
