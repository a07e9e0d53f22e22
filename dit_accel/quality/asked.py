"""What ``accelerate()`` asks of quality targets: the profile to run with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .matching import profile_for
from .profile import Profile, load_profile
from .target import target_from


def profile_asked(
    pipe: Any,
    targets: Mapping[str, float | None],
    profile: Profile | str | Path | None,
    prompts: Sequence[str] | None,
    held_out: Sequence[str] | None,
    beside: Mapping[str, Any],
    call: Mapping[str, Any] | None,
) -> Profile | None:
    """The profile that a target or a file names.

    Args:
        pipe: a diffusers pipeline.
        targets: ``target_psnr``, ``target_ssim``, ``max_rel_error`` and ``max_time``, one of them given or none.
        profile: a profile or its file; with a target it must be for that one.
        prompts: to tune on, where no profile is saved.
        held_out: likewise, for the last check.
        beside: what else is put on the pipeline, as arguments of ``accelerate()``.
        call: arguments of the pipeline's call.

    Returns:
        None if neither a target nor a profile is given.

    Raises:
        ValueError: for two targets, prompts without a target, a bare model, and what
            :func:`dit_accel.quality.profile_for` refuses.
    """
    aimed = any(value is not None for value in targets.values())
    if not aimed and (prompts or held_out or call):
        raise ValueError(
            "prompts, held_out and call belong to a quality target; give target_psnr, target_ssim, max_rel_error or "
            "max_time with them"
        )
    if not aimed and profile is None:
        return None
    if isinstance(pipe, nn.Module):
        raise ValueError(
            f"quality is measured on what a pipeline makes; give the pipeline, not its {type(pipe).__name__} alone"
        )
    if not aimed and profile is not None:
        return profile if isinstance(profile, Profile) else load_profile(profile)
    target = target_from(**targets)
    return profile_for(
        pipe, target, profile=profile, prompts=prompts, held_out=held_out, beside=beside, **dict(call or {})
    )
