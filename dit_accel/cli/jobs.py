"""What one render command runs: one video, or dense and accelerated from the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.metrics import describe_noise_floor, psnr, ssim

from .cache_options import CacheChoice
from .errors import UsageError, one_line
from .plain import plain
from .sampling import Run, sample, warm_up

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_accel import Acceleration
    from dit_accel.report import Report

    from .pipelines import Loaded
    from .settings import Settings


@dataclass(frozen=True)
class Job:
    """All that one command rendered.

    Attributes:
        load_s: seconds the model took to load.
        main: the run that was asked for.
        acceleration: the report of what the method did; None if dense.
        dense: the dense run that ``main`` was compared with, if it was.
        comparison: what the comparison found.
        picture: file with the schedule of the cache, if it was asked for.
    """

    load_s: float
    main: Run
    acceleration: dict[str, Any] | None
    dense: Run | None = None
    comparison: dict[str, Any] | None = None
    picture: bytes | None = None

    def record(self) -> dict[str, Any]:
        """Timings and measurements, as they are written to files."""
        record = {"timings": {"load_s": self.load_s, **self.main.timings()}, "acceleration": self.acceleration}
        return record if self.comparison is None else {**record, "comparison": self.comparison}


def render_job(loaded: Loaded, settings: Settings) -> Job:
    """Renders what the settings ask for.

    Raises:
        UsageError: if the pipeline or the acceleration refuses the settings.
        EnvironmentProblem: if memory does not suffice.
    """
    with limited_threads(settings.threads):
        if settings.compare:
            return _compare(loaded, settings)
        run, report = _sample_as_asked(loaded.pipe, settings)
        return Job(loaded.load_s, run, _plain_report(report), picture=_picture(report, settings))


def _sample_as_asked(pipe: DiffusionPipeline, settings: Settings) -> tuple[Run, Report | None]:
    """One run with the method and the cache asked for, and the report of what they did."""
    if settings.is_dense:
        return sample(pipe, settings, "dense"), None
    with _accelerated(pipe, settings) as handle:
        run = sample(pipe, settings, settings.label)
        return run, handle.report()


def _plain_report(report: Report | None) -> dict[str, Any] | None:
    return None if report is None else plain({**report.to_dict(), "summary": report.summary()})


def _picture(report: Report | None, settings: Settings) -> bytes | None:
    """The schedule as the file that was asked for."""
    if report is None or settings.cache.picture is None or not report.caches:
        return None
    if settings.cache.picture.suffix.lower() == ".svg":
        return report.picture().encode()
    from dit_accel.caching.picture import schedule_png

    return schedule_png(report.caches)


def _compare(loaded: Loaded, settings: Settings) -> Job:
    """Dense, accelerated, dense again: the repetition gives the noise floor, and cancels a drift in speed."""
    pipe = loaded.pipe
    if settings.cache.is_on:
        with _accelerated(pipe, settings):  # what cannot be put on is better known before a dense video was rendered
            pass
    warm_up(pipe, settings, decode=True)
    if settings.attention != "dense":  # the cache has nothing to compile, and may be for so many steps only
        with _accelerated(pipe, replace(settings, cache=CacheChoice(), timed=False), **_sparse_at_once(settings)):
            warm_up(pipe, settings, decode=False, steps=2)  # some methods search first, and are sparse in the next
    dense = sample(pipe, settings, "dense")
    run, report = _sample_as_asked(pipe, settings)
    again = sample(pipe, settings, "dense again")
    measured = plain(_measure(run, dense, again))
    return Job(loaded.load_s, run, _plain_report(report), dense, measured, _picture(report, settings))


def _sparse_at_once(settings: Settings) -> dict[str, Any]:
    """The change of the method's settings by which no step is dense, so that two steps show what a warm-up must."""
    schedule = settings.method.get("schedule")
    return {"dense_steps": 0} if schedule is None else {"schedule": {**schedule, "dense_steps": 0}}


def _measure(run: Run, dense: Run, again: Run) -> dict[str, Any]:
    """Compares a run with the mean time of two dense ones, and with the video of the first."""
    floor = psnr(again.frames, dense.frames)
    seconds = {name: (value + again.timings()[name]) / 2 for name, value in dense.timings().items()}
    images, reference = (frames.permute(0, 3, 1, 2) for frames in (run.frames, dense.frames))
    return {
        "psnr_db": psnr(images, reference),
        "ssim": ssim(images, reference),
        "noise_floor_psnr_db": floor,
        "noise_floor": describe_noise_floor(floor),
        "sampling_ratio": seconds["sampling_s"] / run.sampling_s,
        "total_ratio": seconds["total_s"] / run.total_s,
        "dense_timings": [dense.timings(), again.timings()],
    }


@contextmanager
def _accelerated(pipe: DiffusionPipeline, settings: Settings, **changes: Any) -> Iterator[Acceleration]:
    from dit_accel import accelerate

    has_method = settings.attention != "dense"
    method: dict[str, Any] = {"preset": settings.preset, **settings.method, **changes} if has_method else {}
    cache = settings.cache
    try:
        handle = accelerate(
            pipe,
            attention=settings.attention if has_method else None,
            cache=cache.preset,
            cache_settings=cache.settings or None,
            profile=cache.profile,
            timed=settings.timed,
            **method,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        off = (
            "--attention dense renders without it" if has_method else "leave out --cache and --profile to render dense"
        )
        raise UsageError(f"{one_line(error)} ({off})") from error
    with handle:
        yield handle


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Lets torch use so many CPU threads inside; None for as many as it likes."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
