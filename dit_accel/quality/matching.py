"""What ``accelerate(pipe, target_psnr=28)`` asks: the saved profile that fits, or a new one."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .key import Key, key_of, same_bucket
from .profile import HOW_TO_TUNE, Profile, ProfileWarning, load_profile
from .request import attention_of, defaults_of, settled, steps_of
from .target import Target
from .tuning import tune

FOLDER = "DIT_ACCEL_PROFILES"
"""Environment variable that names the folder of saved profiles."""
_CHOOSING = (
    "height",
    "width",
    "num_frames",
    "guidance_scale",
    "guidance_scale_2",
)  # arguments of calls that must agree


def profiles_folder() -> Path:
    """Where profiles are saved: what the environment variable says, else a folder in the user's cache."""
    named = os.environ.get(FOLDER)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "dit-accel" / "profiles"


def profile_for(
    pipe: Any,
    target: Target,
    *,
    profile: Profile | str | Path | None = None,
    folder: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    beside: Mapping[str, Any] | None = None,
    **call: Any,
) -> Profile:
    """The profile with which a pipeline keeps a target.

    The one that is given; else one that was saved for this model, target and attention; else, if prompts are given,
    one that is tuned now and saved.

    Args:
        pipe: a diffusers pipeline.
        target: what to keep.
        profile: a profile or its file, if it is known.
        folder: of saved profiles; :func:`profiles_folder` by default.
        prompts: to tune on, where nothing is saved.
        held_out: likewise, for the last check.
        beside: other arguments of ``accelerate()``, see :func:`.tune`.
        **call: arguments of the pipeline's call and settings of :func:`.tune`. Steps, size, frames and guidance, where
            given, also choose among saved profiles; with ``force`` those that are off are passed over.

    Raises:
        ValueError: if nothing is saved and no prompts are given, saying how to tune; if several saved profiles fit; if
            the one given is for another target.
    """
    if profile is not None:
        found = profile if isinstance(profile, Profile) else load_profile(profile)
        if found.target != target:
            raise ValueError(
                f"the profile is for {found.target.describe()}, and {target.describe()} is asked for; {HOW_TO_TUNE}"
            )
        return found
    beside = settled(pipe, beside)
    place = Path(folder).expanduser() if folder is not None else profiles_folder()
    wanted, own = dict(call), defaults_of(pipe)
    if prompts:  # what would be tuned has the pipeline's own steps and sizes
        wanted = {name: own.get(name) for name in _CHOOSING} | wanted | {"num_inference_steps": steps_of(pipe, call)}
    saved = matching(place, key_of(pipe, attention_of(beside)), target, wanted, own, exact=bool(prompts))
    if len(saved) > 1:
        names = ", ".join(f"'{path}' ({each.asked_steps} steps)" for path, each in saved)
        raise ValueError(f"several profiles fit: {names}; choose one by profile='...'")
    if saved:
        return saved[0][1]
    if not prompts:
        raise ValueError(
            f"no profile for {target.describe()} with this model is in '{place}', and without prompts none can be "
            f"made; give prompts=[...], held_out=[...] and the arguments of the call, or {HOW_TO_TUNE}"
        )
    return _tuned(pipe, target, place, prompts, held_out or (), beside, call)


def matching(
    folder: Path,
    key: Key,
    target: Target,
    call: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    exact: bool = False,
) -> list[tuple[Path, Profile]]:
    """Saved profiles of a model and a target; files that are none are passed over with a warning.

    Args:
        folder: where they lie.
        key: of the model.
        target: what they keep.
        call: what is known of the call they are to be for, see :func:`profile_for`.
        defaults: arguments that the pipeline's call has by itself, which hold for what a profile does not name.
        exact: whether what the model decides by itself (None) is another thing than a number; else it may be the same.
    """
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            profile = load_profile(path)
        except ValueError as error:
            warnings.warn(f"dit_accel: passed over: {error}", ProfileWarning, stacklevel=2)
            continue
        fits = profile.target == target and not profile.key.model_differences(key)
        if fits and _is_for(profile, call or {}, defaults or {}, exact):
            found.append((path, profile))
    return found


def _is_for(profile: Profile, call: Mapping[str, Any], defaults: Mapping[str, Any], exact: bool) -> bool:
    """Whether a profile was tuned with such a call, as far as this is known."""
    steps, saved = call.get("num_inference_steps"), {**defaults, **profile.settings.get("call", {})}
    if (profile.is_off and call.get("force")) or (steps is not None and profile.asked_steps not in (None, steps)):
        return False
    both = {name: (saved.get(name), call[name]) for name in _CHOOSING if name in call}
    known = {name: pair for name, pair in both.items() if None not in pair}
    if exact and any(then != now for name, (then, now) in both.items() if name not in known):
        return False
    if {"height", "width"} <= known.keys():
        sizes = zip(known.pop("height"), known.pop("width"), strict=True)
        if not same_bucket(*sizes):
            return False
    return all(then == now for then, now in known.values())


def file_name(profile: Profile) -> str:
    """A name that tells profiles of other conditions apart."""
    key = profile.key.to_json() | {"model": ""}
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return f"{profile.key.pipeline}-{profile.key.steps}steps-{profile.target.kind}{profile.target.value:g}-{mark}.json"


def _tuned(
    pipe: Any,
    target: Target,
    folder: Path,
    prompts: Sequence[str],
    held_out: Sequence[str],
    beside: Mapping[str, Any],
    call: Mapping[str, Any],
) -> Profile:
    wanted: dict[str, Any] = {target.keyword: target.value}
    profile = tune(pipe, prompts=prompts, held_out=held_out, beside=beside, **wanted, **call)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profile.save(folder / file_name(profile))
    except OSError as error:
        warnings.warn(f"dit_accel: the profile could not be saved: {error}", ProfileWarning, stacklevel=2)
    return profile
