"""dit_accel speeds up and steers video and image generation in Hugging Face diffusers, on the pipelines people have.

::

    import dit_accel

    with dit_accel.accelerate(pipe, attention="radial") as accelerated:
        video = pipe("a red circle moving left on a gray background").frames[0]
    print(accelerated.report().summary())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .install_late import extend_diffusers

if TYPE_CHECKING:
    from .acceleration import Acceleration, acceleration_of
    from .controls import AttentionControl, AttentionMassRecorder
    from .entry import accelerate
    from .families import Family, UnknownModelError, register_family
    from .install import BlockHook, BlockRecorder, TokenPermutation
    from .plan.schedule import Schedule
    from .quality import Profile, load_profile, tune

__version__ = "0.1.0"

_HOMES = {
    "Acceleration": ".acceleration",
    "accelerate": ".entry",
    "acceleration_of": ".acceleration",
    "AttentionControl": ".controls",
    "AttentionMassRecorder": ".controls",
    "BlockHook": ".install",
    "BlockRecorder": ".install",
    "Family": ".families",
    "Profile": ".quality",
    "Schedule": ".plan.schedule",
    "TokenPermutation": ".install",
    "UnknownModelError": ".families",
    "load_profile": ".quality",
    "register_family": ".families",
    "tune": ".quality",
}

__all__ = [
    "Acceleration",
    "AttentionControl",
    "AttentionMassRecorder",
    "BlockHook",
    "BlockRecorder",
    "Family",
    "Profile",
    "Schedule",
    "TokenPermutation",
    "UnknownModelError",
    "accelerate",
    "acceleration_of",
    "load_profile",
    "register_family",
    "tune",
]

extend_diffusers()


def __getattr__(name: str) -> Any:
    """Imports public names on first use, so that ``import dit_accel`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
