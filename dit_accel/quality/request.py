"""What tuning is asked for, checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..presets import AUTO, facts_of, recipe_by_name
from ..roots import find_roots
from .target import KEYWORDS

_OWN = ("anchor", "timed")  # arguments of accelerate() that set no method
_FOREIGN = {"cache", "cache_settings", "profile", "prompts", "held_out", "call", "strict", "controls", "block_hooks",
            "token_order", *KEYWORDS.values()}  # fmt: skip


@dataclass(frozen=True)
class Margins:
    """When a cache is accepted.

    Attributes:
        coverage: probability with which one more prompt is to meet the target, by the spread over prompts (see
            :func:`.lower_bound`, and :func:`.shared_coverage`); None to accept on the lowest prompt alone.
        min_speed_up: least measured gain in wall time for which a cache is worth its while.
    """

    coverage: float | None = 0.97
    min_speed_up: float = 1.05

    def __post_init__(self) -> None:
        if self.coverage is not None and not 0.5 <= self.coverage < 1:
            raise ValueError(f"coverage is a probability in [0.5, 1), or None; got {self.coverage}")
        if not self.min_speed_up > 0:
            raise ValueError(f"min_speed_up is a factor above 0, such as 1.05; got {self.min_speed_up}")


def check_prompts(prompts: Sequence[str], held_out: Sequence[str], margins: Margins) -> None:
    """Refuses prompts that are too few, empty or given twice.

    Raises:
        ValueError: saying how many are needed.
    """
    if isinstance(prompts, str) or isinstance(held_out, str):
        raise ValueError("prompts and held_out are lists of texts; got a text")
    everything = [*prompts, *held_out]
    if any(not isinstance(prompt, str) or not prompt.strip() for prompt in everything):
        raise ValueError("a prompt is empty, or no text; say what to show in each")
    least = 1 if margins.coverage is None else 2
    if len(prompts) < least or len(held_out) < 2:
        raise ValueError(
            f"tuning needs at least {least} prompts and 2 held out, better 4 to 8 and 4; got {len(prompts)} and "
            f"{len(held_out)}"
        )
    twice = sorted({prompt for prompt in everything if everything.count(prompt) > 1})
    if twice:
        raise ValueError(f"every prompt counts once, and those held out are others; {twice[0]!r} is given twice")


def settled(pipe: Any, beside: Mapping[str, Any] | None) -> dict[str, Any]:
    """The other arguments of ``accelerate()`` with the method as a processor, alike however it was named.

    Raises:
        ValueError: for an unknown method, preset or setting, or what decides the cache or the dense video itself.
    """
    given = dict(beside or {})
    foreign = sorted(_FOREIGN & given.keys())
    if foreign:
        raise ValueError(
            "beside names what runs with the cache: attention, settings of the method, preset, anchor; leave out "
            + ", ".join(foreign)
        )
    method = given.pop("attention", None)
    own = {name: given.pop(name) for name in _OWN if name in given}
    if isinstance(method, str):
        preset = given.pop("preset", AUTO)
        method, _ = recipe_by_name(method, given, facts_of(find_roots(pipe)), preset)
        given = {}
    return own | given | ({} if method is None else {"attention": method})


def attention_of(beside: Mapping[str, Any] | None) -> str:
    """What the other arguments of ``accelerate()`` make of the attention, for the key of a profile.

    Args:
        beside: as :func:`settled` gives them.
    """
    return repr(dict(sorted(beside.items()))) if beside else "stock"


def steps_of(pipe: Any, call: Mapping[str, Any]) -> int | None:
    """The number of sampling steps of a call; None if it cannot be told before."""
    for name in ("sigmas", "timesteps"):  # lists of the user's own, one for each step
        if call.get(name) is not None:
            return len(call[name])
    steps = call.get("num_inference_steps", defaults_of(pipe).get("num_inference_steps"))
    return steps if isinstance(steps, int) else None


def defaults_of(pipe: Any) -> dict[str, Any]:
    """The arguments that a pipeline's call has by itself."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: each.default for name, each in parameters.items() if each.default is not each.empty}
