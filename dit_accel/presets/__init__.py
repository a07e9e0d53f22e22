"""Published settings by method and model, and the choice of a method by model, token count, steps and device."""

from .auto import AutoAttnProcessor, Choice, Chosen, Situation, auto_processor, decide, situation_of
from .lookup import AUTO, Completed, ModelFacts, complete, facts_of, fitting, layered, named, presets_of
from .recipe import recipe_by_name
from .table import PRESETS, Preset

__all__ = [
    "AUTO",
    "PRESETS",
    "AutoAttnProcessor",
    "Choice",
    "Chosen",
    "Completed",
    "ModelFacts",
    "Preset",
    "Situation",
    "auto_processor",
    "complete",
    "decide",
    "facts_of",
    "fitting",
    "layered",
    "named",
    "presets_of",
    "recipe_by_name",
    "situation_of",
]
