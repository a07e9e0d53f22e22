"""Where caching cannot pay, so that it stays off unless it is forced."""

from __future__ import annotations

import re
from typing import Any

from ..roots import find_roots

FEWEST_STEPS = 9
_FEW_STEP_SCHEDULERS = ("LCM", "TCD", "Lightning", "SCM", "FlashFlowMatch")
_FEW_STEP_NAMES = re.compile(
    r"(?<![a-z])(lcm|tcd|lightning|turbo|hyper|schnell|distill(ed)?|causvid|dmd\d?)(?![a-z])"
    r"|(?<![a-z0-9])\d{1,2}[-_ ]?steps?(?![a-z])"
)


def reason_to_stay_off(pipe: Any, steps: int | None) -> str | None:
    """Why caching is off for a pipeline; None if it may pay.

    Few-step models have nothing to reuse: neighboring steps differ too much. They are told by the number of steps, the
    scheduler, and the names of model and LoRAs.

    Args:
        pipe: a diffusers pipeline.
        steps: number of sampling steps; None if it is not known.
    """
    if steps is not None and steps < FEWEST_STEPS:
        return f"{steps} steps are too few: neighboring ones differ too much to stand in for each other"
    scheduler = type(getattr(pipe, "scheduler", None)).__name__
    if any(word in scheduler for word in _FEW_STEP_SCHEDULERS):
        return f"{scheduler} samples in few, very different steps"
    for name in (*_adapters(pipe), *_names(pipe)):
        if _FEW_STEP_NAMES.search(name.lower()):
            return f"{name!r} is the name of a distilled model or LoRA, whose few steps differ too much"
    return None


def _adapters(pipe: Any) -> list[str]:
    found: list[str] = []
    for root in find_roots(pipe).values():
        found += [str(name) for name in getattr(root, "peft_config", None) or {}]
    return found


def _names(pipe: Any) -> list[str]:
    """Last parts of where the model came from: folders above it may have any name."""
    parts = [pipe, *find_roots(pipe).values()]
    names = [str((getattr(part, "config", None) or {}).get("_name_or_path") or "") for part in parts]
    return [name.rstrip("/").rpartition("/")[2] for name in names if name]
