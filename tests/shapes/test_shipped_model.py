"""The model in the package: complete, small, and able to follow a prompt it never saw."""

from __future__ import annotations

import time

import pytest
import torch

import dit_accel
from dit_accel.shapes import path
from dit_accel.shapes.evaluate import score
from dit_accel.shapes.world import held_out_attributes


@pytest.fixture(scope="module")
def pipe():
    from diffusers import WanPipeline

    loaded = WanPipeline.from_pretrained(path("shapes-wan"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_fits_the_package_and_loads_fast():
    from diffusers import WanPipeline

    files = [file for file in path("shapes-wan").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    started = time.perf_counter()
    WanPipeline.from_pretrained(path("shapes-wan"))
    assert time.perf_counter() - started < 10  # about 1 s on an idle machine


def test_it_is_a_stock_pipeline(pipe):
    names = {name: type(part).__name__ for name, part in pipe.components.items() if part is not None}
    assert names["transformer"] == "WanTransformer3DModel" and names["vae"] == "AutoencoderKLWan"
    assert names["text_encoder"] == "UMT5EncoderModel"
    assert dit_accel.acceleration_of(pipe) is None


def test_names_of_shipped_models():
    assert path("wan") == path("shapes-wan")
    with pytest.raises(ValueError, match="choose one of shapes-wan"):
        path("shapes-flux")


@pytest.mark.slow
def test_held_out_prompts_at_a_quarter_of_the_default_size(pipe):
    """Colour, motion and background of prompts it never saw; fine shape needs the default size (docs/shapes.md)."""
    right = {"color": 0, "motion": 0, "background": 0}
    chosen = held_out_attributes()[:4]
    for index, attributes in enumerate(chosen):
        frames = pipe(
            attributes.prompt,
            height=128,
            width=128,
            num_frames=17,
            num_inference_steps=12,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(index),
            output_type="pt",
        ).frames[0]
        judged = score(frames.float(), attributes)
        for word in right:
            right[word] += getattr(judged, word)
    assert right["color"] == right["background"] == 4 and right["motion"] >= 3
