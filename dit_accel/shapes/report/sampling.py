"""Renders prompts of the shapes world with a pipeline; report and comparison share it."""

from __future__ import annotations

import hashlib
import inspect
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...machine import device_name
from ..info import FILE
from .records import Record
from .settings import Settings, model_folder

if TYPE_CHECKING:
    from ...acceleration import Acceleration
    from ...report import Report

PACKAGES = ("torch", "diffusers", "transformers")
HASHED = (".safetensors", ".json", ".txt", ".model")  # files of a pipeline that decide what it makes


class Sample(NamedTuple):
    """A clip ``[frames, 3, height, width]`` in [0, 1] on the CPU, and what it took.

    Attributes:
        video: the clip; an image is a clip of one frame.
        seconds: the whole call, with text encoding and decoding.
        sampling_seconds: up to the end of the last step, without decoding.
        attention: what the method did (kept pairs, backend, calls that fell back to dense); None for dense.
    """

    video: torch.Tensor
    seconds: float
    sampling_seconds: float
    attention: Record | None


class Sampler:
    """A loaded pipeline that renders single prompts, dense or accelerated, always from the same noise.

    Its class is the one that the folder's ``model_index.json`` names: any text-to-video or text-to-image pipeline.

    Attributes:
        pipe: the pipeline on its device.
        load_seconds: what reading it and bringing it to its device took, without the import of diffusers.

    Raises:
        ValueError: if there is no such model, or it makes images and clips were asked for.
        FileNotFoundError: if its folder holds no pipeline.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = model_folder(settings.model)
        self.pipe, self.load_seconds = _load(self.folder, settings)
        self.makes_clips = "num_frames" in inspect.signature(self.pipe.__call__).parameters
        if settings.frames > 1 and not self.makes_clips:
            raise ValueError(
                f"{type(self.pipe).__name__} makes images: say motion false and frames 1 in {self.folder}/shapes.json"
            )

    def sample(self, prompt: str, index: int, attention: str) -> Sample:
        """Renders the prompt of one index; noise depends on the index alone, not on device or attention."""
        ends = [0.0]

        def step_end(_pipe: object, _step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(self._now())
            return tensors

        with self._accelerated(attention) as acceleration:
            started = self._now()
            output = self.pipe(prompt, **self._arguments(index), callback_on_step_end=step_end)
            finished = self._now()
            attention_report = None if acceleration is None else _attention(acceleration.report())
        video = (output.frames[0] if self.makes_clips else output.images[:1]).float().cpu().clamp(0, 1)
        return Sample(video, finished - started, ends[-1] - started, attention_report)

    def context(self) -> Record:
        """Everything the results depend on: settings, weights, versions and machine."""
        return {
            **asdict(self.settings),
            "model": self.folder.name if Path(self.settings.model).is_dir() else self.settings.model,
            "pipeline": type(self.pipe).__name__,
            "weights": weights_digest(self.folder),
            "versions": {**{name: metadata.version(name) for name in PACKAGES}, "dit_accel": _own_version()},
            "machine": device_name(self.settings.device),
        }

    def _arguments(self, index: int) -> dict[str, Any]:
        settings = self.settings
        return {
            "height": settings.height,
            "width": settings.width,
            **({"num_frames": settings.frames} if self.makes_clips else {}),
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "generator": torch.Generator("cpu").manual_seed(settings.seed + index),
            "output_type": "pt",
        }

    def _accelerated(self, attention: str) -> AbstractContextManager[Acceleration | None]:
        if attention == "dense":
            return nullcontext()
        import dit_accel

        return dit_accel.accelerate(self.pipe, attention=attention, **self.settings.options)

    def _now(self) -> float:
        if torch.device(self.settings.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def weights_digest(folder: Path) -> str:
    """Short SHA-256 over weights, configurations and vocabularies of a pipeline folder, which decide what it makes.

    So results of a retrained model, or of one with another scheduler, are told apart. What ``shapes.json`` says of
    sampling is in the settings.
    """
    digest = hashlib.sha256()
    files = (file for file in folder.rglob("*") if file.suffix in HASHED and file.is_file())
    for file in sorted(files):
        if file != folder / FILE:
            digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def tell(message: str) -> None:
    """One line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def _load(folder: Path, settings: Settings) -> tuple[Any, float]:
    from diffusers import DiffusionPipeline

    dtypes: Any = getattr(torch, settings.dtype)
    index = DiffusionPipeline.load_config(folder)
    if index["_class_name"].startswith("Wan"):
        # Its autoencoder loses visible quality in 16 bits; the pipeline converts the latents to whatever it has.
        dtypes = {"default": dtypes, "vae": torch.float32}
    started = time.perf_counter()
    with warnings.catch_warnings():
        # older diffusers have no other name for it
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes)
    pipe.to(settings.device)
    seconds = time.perf_counter() - started
    pipe.set_progress_bar_config(disable=True)
    return pipe, seconds


def _attention(report: Report) -> Record:
    names = ("density", "plan_density", "backend", "fallbacks")
    return {name: getattr(report, name) for name in names}


def _own_version() -> str:
    import dit_accel

    return dit_accel.__version__
