"""Finds a preset by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..recipe import Cache

Preset = Callable[..., Cache | tuple[Cache, ...]]


def preset_by_name(
    name: str, root: nn.Module | None = None, settings: Mapping[str, Any] | None = None
) -> Cache | tuple[Cache, ...]:
    """The cache of a paper, by name; several for papers that cache more than one thing.

    Args:
        name: one of :data:`dit_accel.caching.presets.PRESETS`; hyphens count as underscores.
        root: the transformer or UNet it is for. Presets whose settings depend on the model have a parameter ``root``
            and are given it.
        settings: arguments of the preset.

    Raises:
        ValueError: for an unknown name or setting, naming those there are, and for what the preset itself refuses.
    """
    from . import PRESETS

    preset = PRESETS.get(name.replace("-", "_"))
    if preset is None:
        raise ValueError(f"no cache preset is called {name!r}; there are {', '.join(sorted(PRESETS))}")
    given = dict(settings or {})
    known = settings_of(preset)
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(
            f"the cache preset {name!r} has no setting {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(known) or 'none'}"
        )
    if "root" in inspect.signature(preset).parameters:
        given["root"] = root
    missing = [
        key
        for key, parameter in inspect.signature(preset).parameters.items()
        if parameter.default is inspect.Parameter.empty and key not in given
    ]
    if missing:
        raise ValueError(f"the cache preset {name!r} needs the setting {', '.join(map(repr, missing))}")
    return preset(**given)


def settings_of(preset: Preset) -> tuple[str, ...]:
    """Names of the settings a preset takes; the model it is for (``root``) is none."""
    return tuple(key for key in inspect.signature(preset).parameters if key != "root")
