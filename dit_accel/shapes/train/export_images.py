"""Puts the trained parts of an image model together as one pipeline folder, in half precision."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from ..info import FILE, ModelInfo
from ..recipes import sd3, sd15
from ..recipes.image_vae import IMAGE_SIDE, build_image_vae
from .sd3 import Sd3Model
from .sd15 import Sd15Model

# One image has no frames over which attention could decay; the other settings suit its small token grid.
ATTENTION = {"dense_steps": 0.24, "dense_layers": 1, "block": 64}


def export_sd3(vae_folder: Path, run_folder: Path, out: Path) -> None:
    """Writes the ``shapes-sd3`` pipeline; the parts are the moving average of a checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint yet.
    """
    model = Sd3Model(sd3.build_pipeline())
    _load_average(model, run_folder, "sd3")
    model.transformer.half()
    _write(model.pipe, load_vae(vae_folder), steps=24, out=out)


def export_sd15(vae_folder: Path, run_folder: Path, out: Path) -> None:
    """Writes the ``shapes-sd15`` pipeline; the parts are the moving average of a checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint yet.
    """
    model = Sd15Model(sd15.build_pipeline())
    _load_average(model, run_folder, "sd15")
    model.unet.half()
    vae = load_vae(vae_folder)
    vae.register_to_config(shift_factor=None)  # neither this pipeline nor the training of its UNet shifts latents
    _write(model.pipe, vae, steps=20, out=out)


def load_vae(folder: Path) -> AutoencoderKL:
    """The trained autoencoder, without the trace of where it was loaded from that diffusers writes into its config."""
    trained, vae = AutoencoderKL.from_pretrained(folder), build_image_vae()
    vae.load_state_dict(trained.state_dict())
    vae.register_to_config(scaling_factor=trained.config.scaling_factor, shift_factor=trained.config.shift_factor)
    return vae


def _load_average(model: nn.Module, run_folder: Path, stage: str) -> None:
    checkpoint = run_folder / "checkpoint.pt"
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"no checkpoint in {run_folder}; train first: python -m dit_accel.shapes.train {stage}"
        )
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["average"])


def _write(pipe: DiffusionPipeline, vae: AutoencoderKL, steps: int, out: Path) -> None:
    """Text encoders keep single precision: transformers would run them in half, even on a CPU."""
    pipe.register_modules(vae=vae.half())
    pipe.save_pretrained(out, safe_serialization=True)
    info = ModelInfo(
        subset="all",
        motion=False,
        frames=1,
        height=IMAGE_SIDE,
        width=IMAGE_SIDE,
        steps=steps,
        guidance=3.0,
        attention=dict(ATTENTION),
    )
    (out / FILE).write_text(json.dumps(asdict(info), indent=2) + "\n")
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
