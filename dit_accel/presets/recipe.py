"""From the name of a method to its processor, for :func:`dit_accel.accelerate` and the command line alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..processors import ATTENTION, SparseAttnProcessor, processor_by_name
from .auto import auto_processor
from .lookup import AUTO, Completed, ModelFacts, complete


def recipe_by_name(
    method: str, settings: Mapping[str, Any], facts: ModelFacts, preset: str | None = AUTO
) -> tuple[SparseAttnProcessor, Completed | None]:
    """The processor of a method, with the settings of a preset filled in.

    Args:
        method: its name, or ``"auto"``.
        settings: those that the user gave; they win.
        facts: about the model.
        preset: name of a preset, ``"auto"`` for the one that fits the model, None for none.

    Returns:
        the processor, and what was filled in; None for ``"auto"``, which fills in when it chooses.

    Raises:
        ValueError: for an unknown method, preset or setting, or a setting out of range.
    """
    if method == "auto":
        return auto_processor(settings, preset), None
    if method not in ATTENTION:
        raise ValueError(f"unknown attention method {method!r}; choose one of {', '.join(ATTENTION)}, auto")
    completed = complete(method, settings, facts, preset)
    return processor_by_name(method, **completed.settings), completed
