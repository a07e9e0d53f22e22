"""Real pairs: dense and cached from the same noise, compared in float32 and timed in turns."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..entry import accelerate
from ..metrics import describe_noise_floor, flicker, lpips, motion_ratio, psnr, ssim
from ..metrics.perceptual import LEAST_SIDE
from .sampling import Generation, NotFinite, Sampler
from .spec import CacheSpec
from .target import Target

if TYPE_CHECKING:
    from .progress import Progress

LOST_MOTION = 0.9  # a motion ratio below this is an alarm


@dataclass(frozen=True)
class Pair:
    """One prompt, cached against dense.

    Attributes:
        prompt: what was shown.
        psnr: in dB, of the decoded frames.
        ssim: likewise, at most 1.
        rel_error: relative L2 error of the final latents.
        motion: motion of the cached video over that of the dense one; None for images.
        flicker: mean absolute difference of frame differences; None for images.
        lpips: perceptual distance; None where the package or its weights are missing.
        seconds: of the cached call.
        dense_seconds: of a dense call just before it; None if none was made.
    """

    prompt: str
    psnr: float
    ssim: float
    rel_error: float
    motion: float | None = None
    flicker: float | None = None
    lpips: float | None = None
    seconds: float = 0.0
    dense_seconds: float | None = None

    def value(self, target: Target) -> float:
        """The metric that a target bounds; PSNR for a time."""
        return {"ssim": self.ssim, "rel_error": self.rel_error}.get(target.kind, self.psnr)

    def score(self, target: Target) -> float:
        """That metric in decibels, see :meth:`Target.score`."""
        return target.score(self.value(target))


def compare(prompt: str, dense: Generation, cached: Generation, perceptual: bool = False) -> Pair:
    """All metrics of a pair.

    Args:
        prompt: of both.
        dense: the reference.
        cached: from the same noise.
        perceptual: whether to compute LPIPS, where it can be.
    """
    moves = len(dense.frames) > 1
    return Pair(
        prompt,
        psnr(cached.frames, dense.frames),
        ssim(cached.frames, dense.frames),
        relative_error(cached.latents, dense.latents),
        motion_ratio(cached.frames, dense.frames) if moves else None,
        flicker(cached.frames, dense.frames) if moves else None,
        _lpips(cached.frames, dense.frames) if perceptual else None,
        cached.seconds,
    )


def relative_error(latents: Tensor, reference: Tensor) -> float:
    """``|latents - reference| / |reference|``, Euclidean norms over everything."""
    size = float(reference.double().norm())
    error = float((latents.double() - reference.double()).norm())
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def can_measure_lpips() -> bool:
    """Whether the package is installed."""
    return find_spec("lpips") is not None and find_spec("torchvision") is not None


def _lpips(frames: Tensor, reference: Tensor) -> float | None:
    if min(frames.shape[-2:]) < LEAST_SIDE or not can_measure_lpips():
        return None
    try:
        return lpips(frames, reference)
    except (OSError, ImportError) as error:  # its weights are downloaded on first use
        warnings.warn(f"dit_accel: LPIPS is left out: {error}", stacklevel=2)
        return None


class BeyondFloor(ValueError):
    """A target asks for more than dense runs keep among themselves."""


@dataclass(frozen=True)
class NoiseFloor:
    """How far apart dense runs from the same noise are: no cache can be told to be nearer.

    Attributes:
        psnr: lowest between any run and its first one, in dB; infinity if all are bit-equal.
        ssim: likewise.
        rel_error: highest, of the final latents.
        runs: how many were compared with their first one.
    """

    psnr: float = float("inf")
    ssim: float = 1.0
    rel_error: float = 0.0
    runs: int = 0

    def joined(self, pair: Pair) -> NoiseFloor:
        """With one more comparison."""
        return NoiseFloor(
            min(self.psnr, pair.psnr), min(self.ssim, pair.ssim), max(self.rel_error, pair.rel_error), self.runs + 1
        )

    def check(self, target: Target) -> None:
        """Refuses a target that dense runs do not meet among themselves.

        Raises:
            BeyondFloor: naming the floor.
        """
        if target.is_time:
            return
        floor = {"psnr": self.psnr, "ssim": self.ssim, "rel_error": self.rel_error}[target.kind]
        if target.score(floor) < target.wanted:
            unit = " dB" if target.kind == "psnr" else ""
            raise BeyondFloor(
                f"{target.keyword}={target.value:g} is beyond the noise floor: two dense runs from the same noise "
                f"reach {floor:.4g}{unit} only. Ask for less, or make the kernels deterministic "
                "(torch.use_deterministic_algorithms(True))"
            )


class Bench:
    """Runs prompts dense and cached on one pipeline, and remembers every pair.

    Dense frames and latents of all prompts stay in memory on the CPU.

    Args:
        sampler: calls the pipeline.
        prompts: all of them; their place is their noise.
        beside: other arguments of ``accelerate()`` for cached runs, such as ``{"attention": "radial"}``.
        perceptual: whether to compute LPIPS, where it can be.
        progress: keeps every pair on disk; those it has are not run again, but see ``wants_fresh_times``.

    Attributes:
        sampler: as given.
        prompts: as given.
        floor: between dense runs so far.
        runs: how many generations were made, dense ones and cached ones.
        wants_fresh_times: whether seconds are to be of this session; then pairs of an earlier one are run again.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[str],
        beside: Mapping[str, Any] | None = None,
        perceptual: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.sampler, self.prompts, self._beside = sampler, tuple(prompts), dict(beside or {})
        self._perceptual = perceptual
        self._dense: dict[int, Generation] = {}
        self._progress = progress
        self._pairs: dict[tuple[CacheSpec, int], Pair] = {} if progress is None else dict(progress.pairs)
        self._old = set(self._pairs)  # of an earlier session
        self.floor = NoiseFloor()
        self.runs = {"dense": 0, "cached": 0}
        self.wants_fresh_times = False

    def run_dense(self, number: int) -> Generation:
        """One more dense run of a prompt; how far it is from its first one lowers the noise floor.

        Raises:
            ValueError: if it comes to NaN, which is no fault of a cache.
        """
        try:
            found = self.sampler.run(self.prompts[number], number)
        except NotFinite as error:
            raise ValueError(f"without any cache, {self.prompts[number]!r}: {error}") from error
        self.runs["dense"] += 1
        if number in self._dense:
            self.floor = self.floor.joined(compare(self.prompts[number], self._dense[number], found))
        else:
            self._dense[number] = found
        return found

    def pair(self, spec: CacheSpec, number: int, timed: bool = False) -> Pair:
        """One prompt with a cache.

        Args:
            spec: the cache.
            number: of the prompt.
            timed: whether to run dense once more just before it, so that both times are of the same moment.
        """
        known = None if self._is_stale(spec, number) else self._pairs.get((spec, number))
        if known is not None and (known.dense_seconds is not None or not timed):
            return known
        dense_seconds = self.run_dense(number).seconds if timed or number not in self._dense else None
        reference = self._dense[number]
        with accelerate(self.sampler.pipe, cache=spec.cache(), **self._beside):
            cached = self.sampler.run(self.prompts[number], number)
        self.runs["cached"] += 1
        pair = compare(self.prompts[number], reference, cached, self._perceptual)
        found = self._pairs[spec, number] = replace(pair, dense_seconds=dense_seconds)
        self._old.discard((spec, number))
        if self._progress is not None:
            self._progress.add(spec, number, found)
        return found

    def dense_steps(self, steps: int) -> int:
        """First steps at which sparse attention beside the cache is dense, so that nothing is reused either."""
        beside = {name: value for name, value in self._beside.items() if name != "anchor"}  # which wants a cache
        if "attention" not in beside:
            return 0
        with accelerate(self.sampler.pipe, **beside) as handle:
            return handle.warm_up_steps(steps)

    def measured(self) -> dict[CacheSpec, list[Pair]]:
        """Every cache that was run, and its pairs; of this session alone where fresh times are wanted."""
        found: dict[CacheSpec, list[Pair]] = {}
        for (spec, number), pair in self._pairs.items():
            if not self._is_stale(spec, number):
                found.setdefault(spec, []).append(pair)
        return found

    def _is_stale(self, spec: CacheSpec, number: int) -> bool:
        """The machine may have been busier, so seconds of two sessions are not to be compared."""
        return self.wants_fresh_times and (spec, number) in self._old


def speed_up(pairs: Sequence[Pair]) -> float | None:
    """Median over prompts of dense over cached wall time, measured in turns; None without such pairs."""
    ratios = [pair.dense_seconds / pair.seconds for pair in pairs if pair.dense_seconds and pair.seconds > 0]
    return statistics.median(ratios) if ratios else None


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Worst and median of every metric over prompts, and the speed-up; worst is the side that harms."""
    found: dict[str, Any] = {"prompts": len(pairs), "speed_up": speed_up(pairs)}
    for name, worst in (("psnr", min), ("ssim", min), ("rel_error", max), ("motion", min), ("flicker", max),
                        ("lpips", max), ("seconds", max)):  # fmt: skip
        values = [value for pair in pairs if (value := getattr(pair, name)) is not None]
        if values:
            found[name] = {"worst": worst(values), "median": statistics.median(values)}
    return found


def records(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Pairs as plain values."""
    return [asdict(pair) for pair in pairs]


def alarms(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """What to look at, in words."""
    lost = [pair for pair in pairs if pair.motion is not None and pair.motion < LOST_MOTION]
    return tuple(f"{pair.prompt!r} keeps {pair.motion:.0%} of its motion only" for pair in lost)


def describe_floor(floor: NoiseFloor) -> str:
    """The noise floor in words."""
    return describe_noise_floor(floor.psnr)
