"""Watches that runs stay within what a profile was measured for."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..roots import find_roots
from .key import guidance_of, key_of
from .profile import HOW_TO_TUNE, Profile, ProfileWarning

if TYPE_CHECKING:
    from ..clock import StepState


class ProfileGuard:
    """Compares each generation with the key of a profile, at its first call of the model.

    Another number of steps is always refused: the schedule would be another one. Other differences are told once, or
    refused.

    Args:
        profile: in use.
        pipe: the pipeline it is used on; only a weak reference is kept.
        attention: what replaces its attention, as :func:`.key_of` takes it.
        strict: whether to refuse instead of telling.

    Raises:
        ValueError: if the model itself differs and ``strict`` is on.
    """

    def __init__(self, profile: Profile, pipe: Any, attention: str = "stock", strict: bool = False) -> None:
        self.profile, self.strict = profile, strict
        self._pipe = weakref.ref(pipe)
        self._key = key_of(pipe, attention)
        self._generation: int | None = None
        self._told: set[str] = set()
        self._say(profile.key.model_differences(self._key))

    def attach(self, clock: Any) -> Callable[[], None]:
        """Watches the models of the pipeline. To be put on after the acceleration, whose clock has ticked then.

        Args:
            clock: of the acceleration.

        Returns:
            a function that takes it off.
        """
        pipe = self._pipe()

        def before(*_: Any) -> None:
            if clock.state is not None:
                self.check(clock.state)

        handles = [root.register_forward_pre_hook(before) for root in find_roots(pipe).values()]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    def check(self, state: StepState) -> None:
        """Looks at the first call of a generation; others pass.

        Raises:
            ValueError: if the number of steps differs, or anything and ``strict`` is on.
        """
        if state.generation == self._generation:
            return
        self._generation = state.generation
        made = self.profile.key
        if made.steps is not None and state.steps is not None and state.steps != made.steps:
            self._generation = None
            raise ValueError(
                f"the profile was made for {made.steps} steps and this run has {state.steps}; run with "
                f"num_inference_steps={self.profile.asked_steps}, or {HOW_TO_TUNE}"
            )
        here = self._key.of_run(state.steps, state.layout.grid, guidance_of(self._pipe()))
        self._say([text for text in made.differences(here) if text not in made.model_differences(here)])

    def _say(self, differences: list[str]) -> None:
        new = [text for text in differences if text not in self._told]
        if not new:
            return
        text = (
            f"the profile ({self.profile.target.describe()}) was measured under other conditions: {'; '.join(new)}. "
            f"What it promises is not known here; {HOW_TO_TUNE}"
        )
        if self.strict:
            self._generation = None
            raise ValueError(text)
        self._told |= set(new)
        warnings.warn(f"dit_accel: {text}", ProfileWarning, stacklevel=2)
