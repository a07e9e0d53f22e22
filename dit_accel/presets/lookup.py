"""Finding the preset of a model, and filling in what the user did not give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..processors import processor_by_name
from .table import PRESETS, REPLACES, Preset

AUTO = "auto"
"""As ``preset=``: the one that fits the model, if any."""
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class ModelFacts:
    """What tells one model from others.

    Attributes:
        classes: names of the class of its transformer or UNet, and of that one's bases.
        config: its configuration.
        experts: how many transformers of the class the pipeline has.
    """

    classes: tuple[str, ...]
    config: Mapping[str, Any]
    experts: int = 1

    @classmethod
    def of_class(cls, root: type, config: Mapping[str, Any], experts: int = 1) -> ModelFacts:
        """The facts about a model that is not loaded."""
        return cls(tuple(base.__name__ for base in root.__mro__), dict(config), experts)


@dataclass(frozen=True)
class Completed:
    """Settings with the rest filled in.

    Attributes:
        settings: for the constructor of the method.
        preset: what the rest was taken from; None if no preset is meant for the model, or none was wanted.
        changed: names of the preset's settings that the user gave other values, or that these made meaningless.
    """

    settings: dict[str, Any]
    preset: Preset | None = None
    changed: tuple[str, ...] = ()

    def describe(self) -> str | None:
        """Name and source of the preset, and what was changed; None without one."""
        if self.preset is None:
            return None
        text = f"{self.preset.name} ({self.preset.source})"
        return f"{text}, but for {', '.join(self.changed)}" if self.changed else text


def facts_of(roots: Mapping[str, Any]) -> ModelFacts:
    """The facts about the roots of a pipeline, by component; experts are those of the class of the first."""
    first = next(iter(roots.values()))
    alike = Counter(type(root) for root in roots.values())
    config = getattr(first, "config", None)
    return ModelFacts.of_class(type(first), config if isinstance(config, Mapping) else {}, alike[type(first)])


def presets_of(method: str) -> tuple[Preset, ...]:
    """All presets of a method."""
    return tuple(preset for preset in PRESETS if preset.method == method)


def fitting(method: str, facts: ModelFacts, grid: Grid | None = None) -> Preset | None:
    """The preset that is meant for a model; None if nothing was published for the method on it.

    Args:
        method: its name.
        facts: about the model.
        grid: frames, rows and columns of tokens, if known: then one for such a grid comes first.
    """
    fit = [preset for preset in presets_of(method) if _fits(preset, facts)]
    for preset in fit:
        if preset.grid and grid and all(here >= there for here, there in zip(grid, preset.grid, strict=True)):
            return preset
    return next((preset for preset in fit if not preset.by_name), None)


def named(method: str, name: str, facts: ModelFacts) -> Preset:
    """A preset by its name, whether or not it is meant for the model.

    Raises:
        ValueError: if the method has none of that name.
    """
    known = presets_of(method)
    for preset in known:
        if preset.name == name:
            return preset
    fit = [preset.name for preset in known if _fits(preset, facts)]
    others = [preset.name for preset in known if preset.name not in fit]
    raise ValueError(
        f"{method} has no preset {name!r}; those that fit this model: {', '.join(fit) or 'none'}; for other models: "
        f"{', '.join(others) or 'none'}; None for the method's own defaults"
    )


def complete(
    method: str, given: Mapping[str, Any], facts: ModelFacts, preset: str | None = AUTO, grid: Grid | None = None
) -> Completed:
    """Fills in what the user did not give.

    Args:
        method: its name.
        given: settings that the user gave; they win.
        facts: about the model.
        preset: name of a preset, :data:`AUTO` for the one that fits, None for none.
        grid: frames, rows and columns of tokens, if known.

    Raises:
        ValueError: for an unknown name of a preset, or settings that the method refuses beside those of a preset.
    """
    if preset is None:
        return Completed(dict(given))
    chosen = fitting(method, facts, grid) if preset == AUTO else named(method, preset, facts)
    if chosen is None:
        return Completed(dict(given))
    settings = layered(method, chosen.settings, given)
    published, built = _built(method, chosen.settings), _built(method, settings)
    changed = tuple(name for name in chosen.settings if built.get(name) != published[name])
    return Completed(settings, chosen, changed)


def layered(method: str, lower: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given, and of others below them those that they leave room for.

    Args:
        method: its name.
        lower: such as those of a preset, or those that come with a model.
        given: they win, and a setting that stands in the place of others takes these along (:data:`REPLACES`). A
            schedule that does not say what is dense has that from ``lower``.
    """
    replaces = REPLACES.get(method, {}) | REPLACES["all"]
    rivals = {setting: [name for name in replaces.get(setting, ()) if name not in given] for setting in given}
    dropped = {name for names in rivals.values() for name in names}
    settings = {name: value for name, value in lower.items() if name not in dropped} | dict(given)
    schedule = given.get("schedule")
    if isinstance(schedule, Mapping):
        elsewhere = {name for setting, names in rivals.items() if setting != "schedule" for name in names}
        dense = {name: lower[name] for name in rivals["schedule"] if name in lower and name not in elsewhere}
        settings["schedule"] = dense | dict(schedule)
    return settings


def _built(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the method has them, in which equal ones compare equal; with those of a schedule beside them."""
    built = processor_by_name(method, **settings).settings()
    return built | dict(built.get("schedule") or {})


def _fits(preset: Preset, facts: ModelFacts) -> bool:
    return (
        preset.root_class in facts.classes
        and preset.experts == facts.experts
        and all(facts.config.get(name) == value for name, value in preset.config.items())
    )
