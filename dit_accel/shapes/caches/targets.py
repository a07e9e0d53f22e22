"""Whether a quality target is kept on prompts that took no part in tuning, and how fast that is."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report.cells import Column, decibel_text, heading, markdown_table
from ..report.records import Record
from ..report.sampling import tell
from ..report.settings import Settings
from .contender import Contender, Options

TARGETS = (22.0, 25.0, 28.0, 32.0, 36.0)  # dB that every prompt is to reach
GROUP = "quality targets"
HELD_OUT = 2  # of the prompts that tuning has, for its own last check
NEAR = 0.02  # relative difference of speed-ups that counts as none


class Tuning:
    """Tunes for all targets at once, when the first of them is asked for: they share dense runs and pairs.

    Args:
        targets: PSNR in dB.
        prompts: to tune on; the last :data:`HELD_OUT` are for its own check.
        seed: of the noise of the first of them.
        call: arguments of the pipeline's call.
        progress: file in which the pairs of tuning are kept.
    """

    def __init__(
        self, targets: Sequence[float], prompts: Sequence[str], seed: int, call: Mapping[str, Any], progress: Path
    ) -> None:
        self._progress = progress
        self._targets, self._prompts, self._seed, self._call = tuple(targets), tuple(prompts), seed, dict(call)
        self._found: dict[float, Options] = {}

    def found(self, pipe: Any, target: float) -> Options:
        """What is found for a target: the cache, None where none keeps it; the reason, and alarms."""
        if not self._found:
            from ... import quality

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", quality.ProfileWarning)  # that there is none is in the table
                profiles = quality.tune_all(
                    pipe,
                    [quality.Target("psnr", each) for each in self._targets],
                    prompts=self._prompts[:-HELD_OUT],
                    held_out=self._prompts[-HELD_OUT:],
                    seed=self._seed,
                    tell=tell,
                    progress=self._progress,
                    **self._call,
                )
            records = [profile.to_json() for profile in profiles]
            names = ("cache", "reason", "alarms")
            self._found = {
                each: {name: record[name] for name in names}
                for each, record in zip(self._targets, records, strict=True)
            }
        return self._found[target]


@dataclass(frozen=True)
class TargetContender(Contender):
    """The cache that tuning finds for a target.

    Attributes:
        target: PSNR in dB.
        tuning: for all targets.
    """

    target: float = 0.0
    tuning: Tuning | None = None

    def calibrate(self, pipe: Any, generate: Callable[[], object], steps: int) -> Options:
        """See :meth:`Contender.calibrate` and :meth:`Tuning.found`."""
        assert self.tuning is not None
        return self.tuning.found(pipe, self.target)

    def install(self, pipe: Any, steps: int, found: Options) -> Any:
        """See :meth:`Contender.install`; where there is no cache the pipeline stays dense."""
        import dit_accel

        from ...quality.spec import CacheSpec

        if found["cache"] is None:
            return None
        return dit_accel.accelerate(pipe, cache=CacheSpec.from_json(found["cache"]).cache())

    def remove(self, pipe: Any) -> None:
        """See :meth:`Contender.remove`."""
        import dit_accel

        acceleration = dit_accel.acceleration_of(pipe)
        if acceleration is not None:
            acceleration.remove()

    def shares_calibration(self, other: Contender) -> bool:
        """See :meth:`Contender.shares_calibration`: every target has a cache of its own."""
        return False


def target_contenders(
    settings: Settings, makes_clips: bool, prompts: Sequence[str], seed: int, progress: Path
) -> list[Contender]:
    """One for each target.

    Args:
        settings: of the comparison.
        makes_clips: whether the pipeline takes a number of frames.
        prompts: to tune on.
        seed: of the noise of the first of them.
        progress: file in which the pairs of tuning are kept, so that it goes on where it was cut off.

    Raises:
        ValueError: for too few prompts.
    """
    if len(prompts) < HELD_OUT + 2:
        raise ValueError(f"--tune-prompts wants at least {HELD_OUT + 2}, of which {HELD_OUT} are for the last check")
    call: Options = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "height": settings.height,
        "width": settings.width,
        **({"num_frames": settings.frames} if makes_clips else {}),
    }
    tuning = Tuning(TARGETS, prompts, seed, call, progress)
    return [
        TargetContender(
            f"PSNR of at least {target:g} dB", GROUP, "target", {"target_psnr": target}, target=target, tuning=tuning
        )
        for target in TARGETS
    ]


def verdicts(rows: Sequence[Record]) -> Record:
    """For each target how many prompts met it, and whether speed falls as targets rise.

    Targets that have the same cache have the same speed, the median over the runs of all of them.

    Args:
        rows: of the table of caches, of target contenders.
    """
    acting = [row for row in rows if row["runs"]]
    found = [_verdict(row, [each for each in acting if _cache(each) == _cache(row)]) for row in acting]
    found = sorted(found, key=lambda each: each["target_psnr"])
    speeds = [each["speedup"] for each in found]
    falls = all(later <= earlier * (1 + NEAR) for earlier, later in itertools.pairwise(speeds))
    return {"targets": found, "speed_falls_with_target": falls if len(found) > 1 else None}


def _cache(row: Record) -> Record | None:
    found: Record | None = row["settings"]["cache"]
    return found


def _verdict(row: Record, alike: Sequence[Record]) -> Record:
    target = row["settings"]["target_psnr"]
    speeds = [run["dense_sampling_seconds"] / run["sampling_seconds"] for each in alike for run in each["prompts"]]
    values = [run["psnr_db"] for run in row["prompts"]]
    met = [value == "bit-equal" or value >= target for value in values]
    cache = _cache(row)
    return {
        "target_psnr": target,
        "met": sum(met),
        "of": len(met),
        "least_db": row["psnr_db"]["min"],
        "mean_db": row["psnr_db"]["mean"],
        "speedup": round(statistics.median(speeds), 3),
        "computed_share": row["computed_share"],
        "least_motion": None if row["motion_ratio"] is None else row["motion_ratio"]["min"],
        "cache": None if cache is None else _described(cache),
        "reason": row["settings"]["reason"],
    }


def _described(cache: Record) -> str:
    from ...quality.spec import CacheSpec

    return CacheSpec.from_json(cache).describe()


def markdown(table: Record) -> str:
    """A heading, a table of targets, and whether speed falls as targets rise."""
    found = table["verdicts"]
    parts = [heading(table), markdown_table(_columns(), found["targets"])]
    caches = [row["cache"] for row in found["targets"] if row["cache"] is not None]
    if len({*caches}) < len(caches):
        parts.append("Targets with the same cache have one speed-up, the median over all of their runs.")
    if found["speed_falls_with_target"] is not None:
        says = "falls" if found["speed_falls_with_target"] else "does not fall"
        parts.append(f"Speed {says} as the target rises.")
    parts += [f"{row['target_psnr']:g} dB: {row['reason']}" for row in found["targets"] if row["cache"] is None]
    return "\n\n".join(parts) + "\n"


def _columns() -> list[Column]:
    return [
        ("target", lambda row: f"{row['target_psnr']:g} dB"),
        ("met by prompts held out", lambda row: f"{row['met']} of {row['of']}"),
        ("least PSNR", lambda row: decibel_text(row["least_db"])),
        ("mean PSNR", lambda row: decibel_text(row["mean_db"])),
        ("speed-up of the loop", lambda row: f"{row['speedup']:.2f}"),
        ("computed", lambda row: f"{row['computed_share']:.3f}"),
        ("least motion", lambda row: "-" if row["least_motion"] is None else f"{row['least_motion']:.2f}"),
        ("cache", lambda row: row["cache"] or "none"),
    ]
