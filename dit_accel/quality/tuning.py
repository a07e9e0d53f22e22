"""``tune``: the fastest cache that keeps a target, found on traces, proven by real pairs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..acceleration import acceleration_of, check_anchor
from ..entry import accelerate
from .automatic import reason_to_stay_off
from .candidates import KINDS
from .key import key_of
from .pairs import Bench, BeyondFloor
from .profile import Profile, ProfileWarning
from .progress import Progress, context_of
from .request import Margins, attention_of, check_prompts, settled, steps_of
from .sampling import Sampler
from .spec import CacheSpec
from .target import Target, target_from
from .trace import Trace
from .tuner import Tell, Tuner


def tune(
    pipe: Any,
    *,
    prompts: Sequence[str],
    held_out: Sequence[str],
    target_psnr: float | None = None,
    target_ssim: float | None = None,
    max_rel_error: float | None = None,
    max_time: float | None = None,
    seed: int = 0,
    coverage: float | None = 0.97,
    min_speed_up: float = 1.05,
    kinds: Sequence[str] = KINDS,
    beside: Mapping[str, Any] | None = None,
    force: bool = False,
    tell: Tell | None = None,
    progress: str | Path | None = None,
    **call: Any,
) -> Profile:
    """Finds the fastest feature cache with which a pipeline keeps a quality, or the most exact one within a time.

    Dense runs of the prompts are recorded; schedules and thresholds are searched on the records without the model; the
    best of them run for real, and every decision is taken on real pairs of the same noise. Prompts held out judge what
    has passed on the others; where it fails there the search goes on with more margin. Accepted is what keeps the
    target on the worst prompt and, by the spread over prompts, would keep it on the next one too.

    Args:
        pipe: a text-to-video or text-to-image pipeline that is not accelerated.
        prompts: to tune on; 4 to 8 that are typical. More of them need less margin.
        held_out: at least 2 others, for the last check.
        target_psnr: dB against dense that every prompt is to reach; give exactly one of these four.
        target_ssim: likewise, structural similarity.
        max_rel_error: highest relative L2 error of the final latents.
        max_time: seconds that a call may take; the most exact cache that is fast enough is taken.
        seed: noise of the first prompt; prompt k has that of ``seed + k``.
        coverage: see :class:`Margins`.
        min_speed_up: see :class:`Margins`.
        kinds: of caches to try, among :data:`.KINDS`.
        beside: other arguments of ``accelerate()`` for cached runs, such as ``{"attention": "radial"}``; dense runs
            stay stock.
        force: tunes few-step models too, where caching is off by itself.
        tell: is given one line about everything that happens.
        progress: a file in which every pair is kept as it is measured, so that the same call, after it was cut off,
            goes on from there; dense runs that are recorded are made again, and with ``max_time`` whatever is timed.
        **call: arguments of the pipeline's call, such as ``num_inference_steps=50, height=480``.

    Returns:
        a profile, which may say that no cache is worth it (:attr:`Profile.is_off`), then also as a warning.

    Raises:
        ValueError: for none or several targets, prompts that are too few or held out and tuned on at once, settings
            the pipeline does not take, a target above the noise floor, an accelerated pipeline, progress of other
            settings, or of weights that are on no device.
        OSError: if the file of progress cannot be written.
    """
    target = target_from(target_psnr, target_ssim, max_rel_error, max_time)
    return tune_all(
        pipe,
        [target],
        prompts=prompts,
        held_out=held_out,
        seed=seed,
        coverage=coverage,
        min_speed_up=min_speed_up,
        kinds=kinds,
        beside=beside,
        force=force,
        tell=tell,
        progress=progress,
        **call,
    )[0]


def tune_all(
    pipe: Any,
    targets: Sequence[Target],
    *,
    prompts: Sequence[str],
    held_out: Sequence[str],
    seed: int = 0,
    coverage: float | None = 0.97,
    min_speed_up: float = 1.05,
    kinds: Sequence[str] = KINDS,
    beside: Mapping[str, Any] | None = None,
    force: bool = False,
    tell: Tell | None = None,
    progress: str | Path | None = None,
    **call: Any,
) -> list[Profile]:
    """As :func:`tune`, for several targets at once: dense runs and pairs are made once for all of them.

    Of targets of one kind the strictest is tuned first; a cache that keeps it and is faster than what is found for a
    looser one is taken for that one too, so that speed never rises with the target.

    Args:
        pipe: see :func:`tune`, as the rest.
        targets: at least one.
        prompts: to tune on.
        held_out: for the last check.
        seed: noise of the first prompt.
        coverage: see :class:`.Margins`.
        min_speed_up: see :class:`.Margins`.
        kinds: of caches to try.
        beside: other arguments of ``accelerate()``.
        force: tunes few-step models too.
        tell: is given one line about everything that happens.
        progress: file in which pairs are kept; targets may be other ones than before.
        **call: arguments of the pipeline's call.

    Returns:
        one profile for each target, in their order.

    Raises:
        ValueError: as :func:`tune`.
        OSError: likewise.
    """
    margins = Margins(coverage, min_speed_up)
    check_prompts(prompts, held_out, margins)
    if not targets:
        raise ValueError("give at least one target, such as Target('psnr', 28)")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds are one or more of {', '.join(map(repr, KINDS))}; got {kinds!r}")
    if acceleration_of(pipe) is not None:
        raise ValueError("the pipeline is accelerated already; call dit_accel.acceleration_of(pipe).remove() first")
    beside = settled(pipe, beside)
    if beside:
        _try_on(pipe, beside)
    sampler, key, everyone = Sampler(pipe, call, seed), key_of(pipe, attention_of(beside)), (*prompts, *held_out)
    reason, tell = None if force else reason_to_stay_off(pipe, steps_of(pipe, call)), tell or _silent
    kept = None if progress is None else Progress(Path(progress).expanduser(), everyone, context_of(sampler, key))
    if kept is not None:
        tell(f"pairs are kept in '{kept.file}', which has {len(kept.pairs)}; the same call goes on from there")
    bench = Bench(sampler, everyone, beside, progress=kept)
    profiles: dict[int, Profile] = {}
    traces: list[Trace] = []
    for number in sorted(range(len(targets)), key=lambda each: (targets[each].kind, -targets[each].wanted)):
        target = targets[number]
        tuner = Tuner(target, margins, bench, len(prompts), key, tell, tuple(kinds), traces)
        profile = tuner.off(f"{reason}; force=True tunes all the same") if reason else _tuned(tuner, len(targets))
        faster = _faster(profile, profiles.values())
        profiles[number] = profile = profile if faster is None else tuner.adopt(faster)
        if profile.is_off:
            text = f"dit_accel: no cache is used for {target.describe()}: {profile.reason}"
            warnings.warn(text, ProfileWarning, stacklevel=3)
    return [profiles[number] for number in range(len(targets))]


def _try_on(pipe: Any, beside: Mapping[str, Any]) -> None:
    """What cannot be put on is better known before hours of dense runs. An anchor wants a cache, which comes later."""
    anchor = beside.get("anchor")
    if anchor is not None:
        check_anchor(anchor, beside.get("attention"))
    accelerate(pipe, **{name: value for name, value in beside.items() if name != "anchor"}).remove()


def _tuned(tuner: Tuner, targets: int) -> Profile:
    """Of several targets one beyond the noise floor is off; a single one is refused."""
    try:
        return tuner.profile()
    except BeyondFloor as error:
        if targets == 1:
            raise
        return tuner.off(str(error))


def _faster(profile: Profile, stricter: Iterable[Profile]) -> CacheSpec | None:
    """The fastest cache for a stricter target of the same kind, if it is faster than the one of a profile.

    No search visits all caches, so it may have passed that one by; speed is to fall as targets rise.
    """
    speeds = {
        each.spec: each.measured["speed_up"]
        for each in stricter
        if each.spec is not None and each.target.kind == profile.target.kind and not profile.target.is_time
    }
    best = max(speeds, key=lambda spec: speeds[spec], default=None)
    return best if best is not None and speeds[best] > profile.measured.get("speed_up", 0.0) else None


def _silent(_: str) -> None:
    """Tells nobody."""
