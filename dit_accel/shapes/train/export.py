"""Puts the trained parts together as one pipeline folder in diffusers' own format, in half precision."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import UMT5EncoderModel

from ..recipe import build_scheduler, build_tokenizer, build_transformer
from .wan import TextConditioned


def export_wan(vae_folder: Path, run_folder: Path, out: Path) -> None:
    """Writes the pipeline; reads the finished parts, or the moving average of a checkpoint if training still runs.

    Raises:
        FileNotFoundError: if neither exists yet.
    """
    text_encoder, transformer = _trained_parts(run_folder)
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=AutoencoderKLWan.from_pretrained(vae_folder, torch_dtype=torch.float16),
        transformer=transformer,
        scheduler=build_scheduler(),
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


def _trained_parts(run_folder: Path) -> tuple[UMT5EncoderModel, torch.nn.Module]:
    checkpoint = run_folder / "checkpoint.pt"
    if not checkpoint.exists():
        raise FileNotFoundError(f"no checkpoint in {run_folder}; train first: python -m dit_accel.shapes.train wan")
    model = TextConditioned()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["average"])
    transformer = build_transformer()
    transformer.load_state_dict(model.transformer.state_dict())
    return model.text_encoder, transformer.half()  # transformers would keep half precision on loading, even on a CPU
