"""One generation of a pipeline as all comparisons need it: frames, final latents, seconds; always the same noise."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESERVED = ("prompt", "generator", "output_type", "return_dict", "callback_on_step_end")


@dataclass(frozen=True)
class Generation:
    """What a pipeline made of a prompt.

    Attributes:
        frames: ``[F, 3, H, W]`` float32 in [0, 1], on the CPU; an image is one frame.
        latents: after the last step, float32, on the CPU.
        seconds: of the whole call: text, sampling and decoding.
    """

    frames: Tensor
    latents: Tensor
    seconds: float


class Sampler:
    """Calls a pipeline with fixed settings; prompt number k always starts from the noise of seed + k.

    Args:
        pipe: a diffusers pipeline.
        settings: arguments of its call, but for prompt, generator and the form of its output.
        seed: of the first prompt.

    Raises:
        ValueError: for settings that are set here, or a pipeline that does not report its steps.
    """

    def __init__(self, pipe: Any, settings: Mapping[str, Any], seed: int = 0) -> None:
        parameters = inspect.signature(type(pipe).__call__).parameters
        taken = [name for name in RESERVED if name in settings]
        if taken:
            raise ValueError(
                f"{', '.join(taken)} cannot be given as settings of the call: prompts come as prompts=[...], noise as "
                "seed=, and the rest is set by the tuning itself"
            )
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = [name for name in settings if name not in parameters and not open_ended]
        if unknown:
            raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")
        if not {"callback_on_step_end", "prompt"} <= set(parameters):
            raise ValueError(
                f"{type(pipe).__name__} takes no prompt, or does not report its steps (callback_on_step_end), so its "
                "final latents cannot be compared; use a text-to-video or text-to-image pipeline that does"
            )
        self.pipe, self.settings, self.seed = pipe, dict(settings), seed

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return torch.device(getattr(self.pipe, "_execution_device", None) or "cpu")

    def run(self, prompt: str, number: int) -> Generation:
        """Renders a prompt.

        Args:
            prompt: what to show.
            number: chooses the noise; the same for all runs that are compared.

        Raises:
            ValueError: if the pipeline gives no single video or image, or NaN.
        """
        last: list[Tensor] = []

        def after_step(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            last[:] = [values["latents"]]
            return values

        generator = torch.Generator().manual_seed(self.seed + number)
        start = self._now()
        output = self.pipe(
            **self.settings,
            prompt=prompt,
            generator=generator,
            output_type="pt",
            return_dict=False,
            callback_on_step_end=after_step,
        )
        seconds = self._now() - start
        if not last:
            raise ValueError(f"{type(self.pipe).__name__} made no step; give num_inference_steps of at least 1")
        return Generation(as_frames(output[0]), last[0].detach().float().cpu(), seconds)

    def _now(self) -> float:
        """The time at which the device has done all it was given, in seconds."""
        if self.device.type in ("cuda", "mps", "xpu"):
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


class NotFinite(ValueError):
    """A generation came to NaN or infinity."""


def as_frames(output: Any) -> Tensor:
    """A pipeline's video ``[1, F, 3, H, W]`` or image ``[1, 3, H, W]`` as ``[F, 3, H, W]`` float32 on the CPU.

    Raises:
        ValueError: if it is neither, or not finite.
    """
    if not isinstance(output, Tensor) or output.ndim not in (4, 5) or output.shape[-3] != 3 or len(output) != 1:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the pipeline gave {shape}; tuning compares one video [1, F, 3, H, W] or one image [1, 3, H, W] per "
            "prompt, so leave out num_images_per_prompt, num_videos_per_prompt and the like"
        )
    frames = (output[0] if output.ndim == 5 else output).detach().float().cpu()
    if not bool(torch.isfinite(frames).all()):
        raise NotFinite("the pipeline gave NaN or infinity; try torch_dtype=torch.float32 or torch.bfloat16")
    return frames.clamp(0, 1)
