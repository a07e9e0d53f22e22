"""The models in the package: complete, small, quick to load, and able to follow prompts they never saw."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest

import dit_accel
from dit_accel.shapes import MODELS, path
from dit_accel.shapes.evaluate import score
from dit_accel.shapes.info import read_info
from dit_accel.shapes.report.sampling import Sampler
from dit_accel.shapes.report.settings import Settings
from dit_accel.shapes.report.subsets import chosen_subsets

CLASSES = {
    "shapes-wan": ("WanPipeline", "WanTransformer3DModel"),
    "shapes-sd3": ("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    "shapes-sd15": ("StableDiffusionPipeline", "UNet2DConditionModel"),
}
SMALL_CLIP = {"frames": 17, "height": 128, "width": 128, "steps": 12}


def loaded(name: str) -> Sampler:
    info = read_info(path(name))
    values = dataclasses.asdict(info) | (SMALL_CLIP if info.motion else {})
    own = {key: values[key] for key in ("steps", "guidance", "frames", "height", "width")}
    return Sampler(Settings(model=name, attention="dense", options={}, seed=0, device="cpu", dtype="float32", **own))


def test_all_of_them_fit_the_package() -> None:
    files = [file for name in MODELS for file in path(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40e6


@pytest.mark.parametrize("name", MODELS)
def test_it_is_a_stock_pipeline_that_loads_fast(name: str) -> None:
    loaded(name)  # the first time also imports the parts of diffusers and transformers
    start = time.thread_time()
    sampler = loaded(name)
    assert time.thread_time() - start < 10  # under 3 s, to which other processes do not add
    pipeline, root = CLASSES[name]
    assert type(sampler.pipe).__name__ == pipeline
    assert root in {type(part).__name__ for part in sampler.pipe.components.values()}
    assert dit_accel.acceleration_of(sampler.pipe) is None
    assert json.loads((path(name) / "model_index.json").read_text())["_class_name"] == pipeline


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_held_out_prompts(name: str) -> None:
    """Colors, motion and background of prompts it never saw; clips at a quarter of their size (docs/shapes.md)."""
    sampler, subset = loaded(name), chosen_subsets(read_info(path(name)), count=4)[0]
    right = []
    for index, words in enumerate(subset.prompts):
        video = sampler.sample(words.prompt, index, "dense").video
        right.append(score(video, words, subset.slots).right)
    for slot, least in (("color", 4), ("background", 4), ("motion", 3)):
        judged = [each[slot] for each in right if slot in each]
        assert sum(judged) >= min(least, len(judged)), (slot, right)
