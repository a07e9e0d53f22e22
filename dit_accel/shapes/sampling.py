"""Renders prompts of the shapes world with a pipeline and judges the clips; report and comparison share it."""

from __future__ import annotations

import hashlib
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .evaluate import Score, judge, observe
from .journal import Record
from .settings import Settings
from .world import Attributes

if TYPE_CHECKING:
    from ..acceleration import Acceleration
    from ..report import Report

PACKAGES = ("torch", "diffusers", "transformers")


class Sample(NamedTuple):
    """A clip ``[frames, 3, height, width]`` in [0, 1] on the CPU, and what it took.

    Attributes:
        video: the clip.
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

    Raises:
        FileNotFoundError: if the model's folder does not exist.
    """

    def __init__(self, settings: Settings) -> None:
        from diffusers import WanPipeline

        self.settings = settings
        self.folder = model_folder(settings.model)
        # The autoencoder loses visible quality in 16 bits; the pipeline converts the latents to whatever it has.
        dtypes = {"default": getattr(torch, settings.dtype), "vae": torch.float32}
        with warnings.catch_warnings():
            # older diffusers have no other name for it
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            self.pipe = WanPipeline.from_pretrained(self.folder, torch_dtype=dtypes)
        self.pipe.to(settings.device)
        self.pipe.set_progress_bar_config(disable=True)

    def sample(self, prompt: str, index: int, attention: str) -> Sample:
        """Renders the prompt of one index; noise depends on the index alone, not on device or attention."""
        settings, ends = self.settings, [0.0]

        def step_end(_pipe: object, _step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(self._now())
            return tensors

        with self._accelerated(attention) as acceleration:
            started = self._now()
            output = self.pipe(
                prompt,
                height=settings.height,
                width=settings.width,
                num_frames=settings.frames,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=torch.Generator("cpu").manual_seed(settings.seed + index),
                output_type="pt",
                callback_on_step_end=step_end,
            )
            finished = self._now()
            attention_report = None if acceleration is None else _attention(acceleration.report())
        video = output.frames[0].float().cpu().clamp(0, 1)
        return Sample(video, finished - started, ends[-1] - started, attention_report)

    def context(self) -> Record:
        """Everything the results depend on: settings, weights, versions and machine."""
        return {
            **asdict(self.settings),
            "model": self.folder.name if Path(self.settings.model).is_dir() else self.settings.model,
            "weights": weights_digest(self.folder),
            "versions": {**{name: metadata.version(name) for name in PACKAGES}, "dit_accel": _own_version()},
            "machine": device_name(self.settings.device),
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


def judged(video: torch.Tensor, attributes: Attributes) -> Record:
    """What a clip shows and which words of its prompt are right, as JSON values."""
    seen = observe(video)
    track = seen.centers[~seen.centers.isnan().any(1)]
    return {
        "seen": {slot: getattr(seen, slot) for slot in Attributes._fields},
        "right": judge(seen, attributes)._asdict(),
        "overlap": _rounded(seen.overlap),
        "residual": _rounded(seen.residual),
        "track": [[round(value, 1) for value in point.tolist()] for point in track[[0, -1]]] if len(track) else None,
    }


def accuracy(judgements: Sequence[Record]) -> Record:
    """Right words over all clips, by attribute and for whole prompts."""
    scores = [Score(**judgement["right"]) for judgement in judgements]
    counts = {slot: sum(getattr(score, slot) for score in scores) for slot in (*Score._fields, "all")}
    return {slot: {"right": right, "of": len(scores), "share": right / len(scores)} for slot, right in counts.items()}


def model_folder(model: str) -> Path:
    """The folder of a shipped model's name or of a path.

    Raises:
        FileNotFoundError: if it holds no pipeline.
    """
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").exists():
            raise FileNotFoundError(f"{model} holds no model_index.json; pass the folder that save_pretrained wrote")
        return Path(model)
    from . import path

    return path(model)


def weights_digest(folder: Path) -> str:
    """Short SHA-256 over all weights of a pipeline folder, so that results of a retrained model are told apart."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def device_name(device: str) -> str:
    """The GPU's name, or the processor's architecture and how many threads torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def median_seconds(values: Sequence[float]) -> float:
    """Median, rounded to milliseconds; robust against the slow first call."""
    return round(statistics.median(values), 3)


def say(message: str) -> None:
    """One line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def _attention(report: Report) -> Record:
    names = ("density", "plan_density", "backend", "fallbacks")
    return {name: getattr(report, name) for name in names}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _own_version() -> str:
    import dit_accel

    return dit_accel.__version__
