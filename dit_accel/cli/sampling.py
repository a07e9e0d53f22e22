"""Calling a pipeline once, with its time split into sampling and decoding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import EnvironmentProblem, UsageError, one_line
from .watch import Watch, stopping, watched

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .settings import Settings

DURATIONS = ("sampling_s", "decode_s", "total_s")


@dataclass(frozen=True)
class Run:
    """One video and the seconds it took.

    Attributes:
        frames: ``[F, H, W, 3]`` float32 in [0, 1], on the CPU.
        sampling_s: from the first pass of the denoiser to the end of the last step.
        decode_s: from there to the finished frames.
        total_s: the whole call of the pipeline, text encoding included, loading not.
    """

    frames: torch.Tensor
    sampling_s: float
    decode_s: float
    total_s: float

    def timings(self) -> dict[str, float]:
        """The three durations, in seconds."""
        return {name: getattr(self, name) for name in DURATIONS}


def sample(pipe: DiffusionPipeline, settings: Settings, label: str) -> Run:
    """Renders one video from the noise of the seed.

    Args:
        pipe: the pipeline as it is, accelerated or not.
        settings: what to render.
        label: names the run in the progress shown.

    Raises:
        UsageError: if the pipeline refuses the settings, or returns no numbers.
        EnvironmentProblem: if memory does not suffice.
    """
    output, watch, start, end = _call(pipe, settings.call_arguments(), settings, label, "np")
    first = start if watch.first is None else watch.first
    frames = torch.as_tensor(output.frames[0]).float()
    run = Run(frames, watch.last - first, end - watch.last, end - start)
    if not torch.isfinite(frames).all():
        raise UsageError(f"the model returned NaN in {settings.dtype}; try --dtype float32 or bfloat16")
    print(f"{label}: sampling {run.sampling_s:.2f} s, decoding {run.decode_s:.2f} s", file=sys.stderr)
    return run


def warm_up(pipe: DiffusionPipeline, settings: Settings, decode: bool, steps: int = 1) -> None:
    """Makes some untimed steps, so that the first timed run does not pay for compiling and allocating.

    ``--attention auto`` chooses by the number of steps, so its steps are the first of as many as will be made.
    """
    steps = min(steps, settings.steps or steps)
    of_many = settings.attention == "auto"
    arguments = settings.call_arguments() | ({} if of_many else {"num_inference_steps": steps})
    _call(pipe, arguments, settings, "warm-up", "np" if decode else "latent", last=steps - 1 if of_many else None)


def _call(
    pipe: DiffusionPipeline,
    arguments: dict[str, Any],
    settings: Settings,
    label: str,
    output_type: str,
    last: int | None = None,
) -> tuple[Any, Watch, float, float]:
    # Noise from a CPU generator is the same on every device.
    generator = torch.Generator().manual_seed(settings.seed)
    with watched(pipe, arguments.get("num_inference_steps"), label) as (watch, extra):
        extra = extra if last is None else stopping(extra, last)
        start = watch.now()
        with explained_errors():
            output = pipe(**arguments, **extra, generator=generator, output_type=output_type)
        return output, watch, start, watch.now()


@contextmanager
def explained_errors() -> Iterator[None]:
    """Around the call of a pipeline: what it refuses is bad input, and too little memory is told with a way out.

    Raises:
        UsageError: for what the pipeline refuses.
        EnvironmentProblem: if memory does not suffice.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise UsageError(one_line(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EnvironmentProblem(
            f"memory does not suffice: {one_line(error)}; try fewer --frames, a smaller size or --dtype bfloat16"
        ) from error
