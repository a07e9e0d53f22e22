"""Tells for which of the models with published settings a root is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn


@dataclass(frozen=True)
class Published:
    """Settings that were published for one model.

    Attributes:
        model: its name.
        root_class: of its transformer in diffusers.
        config: entries of the transformer's config that tell it from others of the class.
        hint: part of the checkpoint's name, in lower case, where the config alone does not tell; ``""`` where it does.
        only_named: whether it is taken only if asked for by its name.
        source: where the settings are from.
    """

    model: str
    root_class: str
    config: Mapping[str, object] = field(default_factory=dict)
    hint: str = ""
    only_named: bool = False
    source: str = ""

    def fits(self, root: nn.Module) -> bool:
        """Whether class, config and checkpoint name say so."""
        config = _config_of(root)
        checkpoint = str(config.get("_name_or_path") or "").lower()
        return (
            type(root).__name__ == self.root_class
            and all(config.get(key) == value for key, value in self.config.items())
            and self.hint in checkpoint
        )


_Row = TypeVar("_Row", bound=Published)


def published_for(rows: Sequence[_Row], root: nn.Module | None, model: str | None, what: str, instead: str) -> _Row:
    """The row for a model.

    Args:
        rows: what there is.
        root: the model; its class and config choose, and a row with a hint goes before one without.
        model: name of a row, which is then taken whatever the root is.
        what: is looked for, for error messages.
        instead: what to do where there is none.

    Raises:
        ValueError: if no row fits, or no single one, naming those there are.
    """
    names = ", ".join(sorted({row.model for row in rows}))
    if model is not None:
        for row in rows:
            if row.model == model:
                return row
        raise ValueError(f"no {what} were published for a model called {model!r}; there are those of {names}")
    fitting = [row for row in rows if root is not None and not row.only_named and row.fits(root)]
    fitting = [row for row in fitting if row.hint] or fitting
    if len(fitting) == 1:
        return fitting[0]
    this = f"this {type(root).__name__}" if root is not None else "no model in particular"
    if fitting:
        raise ValueError(f"{this} may be any of {', '.join(row.model for row in fitting)}; say which by model=")
    near = [row.model for row in rows if root is not None and row.root_class == type(root).__name__]
    likely = f" (of its class: {', '.join(near)})" if near else ""
    raise ValueError(
        f"no {what} were published for {this}; {instead}, or say by model= which it is like: {names}{likely}"
    )


def _config_of(root: nn.Module) -> Mapping[str, object]:
    config = getattr(root, "config", None)
    return config if isinstance(config, Mapping) else vars(config) if hasattr(config, "__dict__") else {}
