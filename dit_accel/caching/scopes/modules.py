"""Single attention and feed-forward modules as units, each by itself; what they give is kept and reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..unit import Unit
from .base import RootView, Scope

ATTENTION_KINDS = ("self", "cross", "joint", "temporal")


@dataclass(frozen=True)
class Modules(Scope):
    """Every attention and feed-forward module within the blocks is a unit; its key is its path.

    Kinds that a model does not have are passed over, as long as it has one of them.

    Attributes:
        kinds: which: ``"self"``, ``"cross"``, ``"joint"``, ``"temporal"`` (attention) and ``"mlp"``.

    Raises:
        ValueError: for no kind, or one that there is not.
    """

    allowed: ClassVar[tuple[str, ...]] = (*ATTENTION_KINDS, "mlp")
    kinds: tuple[str, ...] = (*ATTENTION_KINDS, "mlp")

    def __post_init__(self) -> None:
        kinds = tuple(self.kinds)
        if not kinds or any(kind not in self.allowed for kind in kinds):
            raise ValueError(f"kinds are one or more of {', '.join(self.allowed)}; got {self.kinds!r}")
        object.__setattr__(self, "kinds", kinds)

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`."""
        found = tuple(Unit(path, kind, path=path) for path, kind in view.modules if kind in self.kinds)
        if not found:
            there = sorted({kind for _, kind in view.modules})
            raise ValueError(
                f"{view.name} has no module of kind {', '.join(self.kinds)} in its blocks; "
                f"it has {', '.join(there) or 'none that dit_accel knows'}"
            )
        return found


@dataclass(frozen=True)
class Attention(Modules):
    """Every attention module of some kinds is a unit.

    Attributes:
        kinds: ``"self"``, ``"cross"``, ``"joint"`` and ``"temporal"``.
    """

    allowed: ClassVar[tuple[str, ...]] = ATTENTION_KINDS
    kinds: tuple[str, ...] = ATTENTION_KINDS


class FeedForward(Modules):
    """Every feed-forward module is a unit."""

    def __init__(self) -> None:
        super().__init__(("mlp",))

    def __repr__(self) -> str:
        return "FeedForward()"
