"""What can be tuned, as plain values that a file can hold, and the cache recipe made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..caching.limits import Limits
from ..caching.policies.base import Policy
from ..caching.policies.static import Static
from ..caching.policies.transform import Transform
from ..caching.predictors.base import Predictor
from ..caching.predictors.reuse import Reuse
from ..caching.predictors.settled import Settled
from ..caching.predictors.taylor import Taylor
from ..caching.presets.snr_gap import SETTLE
from ..caching.recipe import Cache
from ..caching.scopes.base import Scope
from ..caching.scopes.blocks import Whole
from ..caching.scopes.output import Output

_SCOPES = ("output", "output - latents", "whole")
_PREDICTORS = ("reuse", "line over steps", "line over noise", "settled line over steps")


@dataclass(frozen=True)
class CacheSpec:
    """One cache among those that are tuned.

    Attributes:
        steps: number of sampling steps it is for.
        scope: ``"output"``, ``"output - latents"`` (the scope ``Output`` without and with ``residual``) or
            ``"whole"``.
        predictor: ``"reuse"``, ``"line over steps"`` or ``"line over noise"`` (``Taylor`` of order 1), or
            ``"settled line over steps"``, which is drawn through no step of the first 4 % (``Settled``).
        computed: steps that are computed; None for a policy that decides while it runs.
        threshold: of that policy (``Transform``, the rule of EasyCache); None for listed steps.
        warmup: first steps that such a policy computes.
        cooldown: last steps that it computes.

    Raises:
        ValueError: for anything else.
    """

    steps: int
    scope: str
    predictor: str
    computed: tuple[int, ...] | None = None
    threshold: float | None = None
    warmup: int = 0
    cooldown: int = 0

    def __post_init__(self) -> None:
        if self.scope not in _SCOPES or self.predictor not in _PREDICTORS:
            raise ValueError(
                f"a tuned cache has a scope of {', '.join(_SCOPES)} and a predictor of {', '.join(_PREDICTORS)}; got "
                f"{self.scope!r} and {self.predictor!r}"
            )
        if (self.computed is None) == (self.threshold is None):
            raise ValueError("a tuned cache has either a list of computed steps or a threshold")

    def cache(self) -> Cache:
        """The recipe."""
        limits = Limits(warmup=self.warmup, cooldown=self.cooldown)
        return Cache(self._scope(), self._policy(), self.predict(), limits, name="tuned")

    def predict(self) -> Predictor:
        """Its predictor."""
        if self.predictor == "reuse":
            return Reuse()
        if self.predictor == "settled line over steps":
            return Settled(Taylor(1), SETTLE)
        return Taylor(1, along="step" if self.predictor == "line over steps" else "sigma")

    @property
    def residual(self) -> bool:
        """Whether latents are taken off the output that is kept."""
        return self.scope == "output - latents"

    def describe(self) -> str:
        """In a few words."""
        when = f"{len(self.computed)} of {self.steps} steps" if self.computed is not None else (
            f"EasyCache below {self.threshold:.4g}"
        )  # fmt: skip
        return f"{self.scope}, {self.predictor}, {when}"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"computed": None if self.computed is None else list(self.computed)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CacheSpec:
        """Back from plain values.

        Raises:
            ValueError: for names or values that are not its own.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or not set(values) <= known:
            raise ValueError(f"a tuned cache has the entries {', '.join(sorted(known))}")
        try:
            computed = values.get("computed")
            spec = cls(**{**values, "computed": None if computed is None else tuple(computed)})
            spec.cache()  # its parts check their numbers
        except TypeError as error:
            raise ValueError(f"the tuned cache is damaged: {error}") from error
        return spec

    def _scope(self) -> Scope:
        return Whole() if self.scope == "whole" else Output(self.residual)

    def _policy(self) -> Policy:
        if self.threshold is not None:
            return Transform(self.threshold)
        return Static(compute_steps=self.computed, steps=self.steps)
