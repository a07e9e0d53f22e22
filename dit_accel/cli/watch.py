"""Following one call of a pipeline: when its sampling loop begins and ends, and how far it is."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .models import ROOTS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class Watch:
    """The clock and the progress bar of one call.

    Attributes:
        device: where the pipeline computes.
        bar: shows the steps and the remaining time.
        first: when the first pass of a denoiser began, in seconds.
        last: when the last step ended.
    """

    device: torch.device
    bar: Any
    first: float | None = None
    last: float = 0.0

    def before_pass(self, *_: Any) -> None:
        """Called before every pass of a denoiser; only the first counts."""
        if self.first is None:
            self.first = self.now()

    def after_pass(self, *_: Any) -> None:
        """Called after every pass, for pipelines that do not report their steps."""
        self.last = time.perf_counter()

    def after_step(self, _pipe: Any, index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline at the end of each step."""
        # Waiting for the device at each step would slow it down; only the end of the last one has to be exact.
        is_last = self.bar.total is not None and index + 1 >= self.bar.total
        self.last = self.now() if is_last else time.perf_counter()
        self.bar.update()
        if is_last:
            self.bar.set_postfix_str("decoding")
        return values

    def now(self) -> float:
        """The time at which the device has done all it was given, in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def watched(pipe: DiffusionPipeline, steps: int | None, label: str) -> Iterator[tuple[Watch, dict[str, Any]]]:
    """Hooks a watch to a pipeline, and takes it off again.

    Args:
        pipe: the pipeline about to be called.
        steps: how many steps it will make, for the remaining time.
        label: stands before the bar.

    Yields:
        The watch, and the arguments to add to the call.
    """
    reports_steps = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    # The pipeline's own bar speaks only where ours cannot. To tqdm, None means: show it on a terminal only.
    pipe.set_progress_bar_config(disable=reports_steps)
    with ExitStack() as stack:
        hidden = None if reports_steps else True
        bar = stack.enter_context(tqdm(total=steps, desc=label, unit="step", disable=hidden, leave=False))
        watch = Watch(torch.device(pipe._execution_device), bar)
        for root in (getattr(pipe, name, None) for name in ROOTS):
            if isinstance(root, torch.nn.Module):
                stack.callback(root.register_forward_pre_hook(watch.before_pass).remove)
                stack.callback(root.register_forward_hook(watch.after_pass).remove)
        yield watch, {"callback_on_step_end": watch.after_step} if reports_steps else {}


def stopping(extra: dict[str, Any], last: int) -> dict[str, Any]:
    """What :func:`watched` adds to a call, with the sampling stopped after a step; pipelines skip what is left.

    Those that do not report their steps make all of them.

    Args:
        extra: from there.
        last: step after which nothing more is to be done, from 0.
    """
    if "callback_on_step_end" not in extra:
        return extra
    watch = extra["callback_on_step_end"]

    def after_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index <= last:
            values = watch(pipe, index, timestep, values)
        pipe._interrupt = index >= last
        return values

    return extra | {"callback_on_step_end": after_step}
