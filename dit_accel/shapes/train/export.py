"""Puts the trained parts of ``shapes-wan`` together as one pipeline folder in diffusers' own format."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from ..info import FILE, ModelInfo
from ..recipes.wan import FRAMES, SIDE, build_pipeline, build_video_vae
from .wan import TextConditioned

INFO = ModelInfo(
    subset="all",
    motion=True,
    frames=FRAMES,
    height=SIDE,
    width=SIDE,
    steps=20,
    guidance=3.0,
    fps=16,
    attention={"dense_steps": 0.24, "dense_layers": 1, "block": 64, "decay": 0.2},
)


def export_wan(vae_folder: Path, run_folder: Path, out: Path) -> None:
    """Writes the pipeline in half precision; its weights are the moving average of a checkpoint, finished or not.

    The text encoder keeps single precision: transformers would run it in half, even on a CPU.

    Raises:
        FileNotFoundError: if there is no checkpoint yet.
    """
    checkpoint = run_folder / "checkpoint.pt"
    if not checkpoint.exists():
        raise FileNotFoundError(f"no checkpoint in {run_folder}; train first: python -m dit_accel.shapes.train wan")
    model, pipe = TextConditioned(), build_pipeline()
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["average"])
    pipe.register_modules(text_encoder=model.text_encoder, transformer=model.transformer.half())
    pipe.register_modules(vae=load_video_vae(vae_folder).half())
    pipe.save_pretrained(out, safe_serialization=True)
    (out / FILE).write_text(json.dumps(asdict(INFO), indent=2) + "\n")
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


def load_video_vae(folder: Path) -> AutoencoderKLWan:
    """The trained autoencoder, without the trace of where it was loaded from that diffusers writes into its config."""
    trained, vae = AutoencoderKLWan.from_pretrained(folder), build_video_vae()
    vae.load_state_dict(trained.state_dict())
    vae.register_to_config(latents_mean=trained.config.latents_mean, latents_std=trained.config.latents_std)
    return vae
