"""The sampler: any of the three pipelines, always from the same noise."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch

from dit_accel.shapes.report.sampling import Sampler, weights_digest
from dit_accel.shapes.report.settings import Settings, add_arguments, model_info, settings_from

from .conftest import write_info

CLIP = "a red circle moving left on a black background"
PICTURE = "a red circle and a small striped blue square on a gradient white background"


def settings(folder: Path, *options: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args(["--model", str(folder), "--device", "cpu", *options])
    return settings_from(parsed, "dense", model_info(str(folder)))


@pytest.mark.parametrize(
    ("kind", "pipeline", "prompt", "shape"),
    [
        ("shapes_wan", "WanPipeline", CLIP, (5, 3, 64, 96)),
        ("shapes_sd3", "StableDiffusion3Pipeline", PICTURE, (1, 3, 64, 96)),
        ("shapes_sd15", "StableDiffusionPipeline", PICTURE, (1, 3, 64, 96)),
    ],
)
def test_any_pipeline_is_sampled_from_the_noise_of_the_index(
    kind: str, pipeline: str, prompt: str, shape: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    sampler = Sampler(settings(request.getfixturevalue(kind), "--seed", "3"))
    assert sampler.context()["pipeline"] == pipeline
    assert 0 < sampler.load_seconds < 60
    first, again, other = (sampler.sample(prompt, index, "dense") for index in (0, 0, 1))
    assert first.video.shape == shape
    assert first.video.dtype == torch.float32
    assert torch.equal(first.video, first.video.clamp(0, 1))
    assert torch.equal(first.video, again.video)
    assert not torch.equal(first.video, other.video)
    assert 0 < first.sampling_seconds < first.seconds
    assert first.attention is None
    shifted = Sampler(settings(request.getfixturevalue(kind), "--seed", "4")).sample(prompt, 0, "dense")
    assert torch.equal(shifted.video, other.video)  # the n-th prompt uses seed + n


@pytest.mark.parametrize("kind", ["shapes_wan", "shapes_sd3", "shapes_sd15"])
def test_sixteen_bits(kind: str, request: pytest.FixtureRequest) -> None:
    sampler = Sampler(settings(request.getfixturevalue(kind), "--dtype", "bfloat16", "--steps", "1"))
    assert float(sampler.sample(CLIP, 0, "dense").video.std()) > 0


def test_a_pipeline_that_makes_no_clips_cannot_be_said_to(shapes_sd15: Path, tmp_path: Path) -> None:
    folder = write_info(Path(shutil.copytree(shapes_sd15, tmp_path / "wrong")))
    with pytest.raises(ValueError, match="StableDiffusionPipeline makes images"):
        Sampler(settings(folder))


def test_the_digest_tells_weights_apart(shapes_wan: Path, shapes_sd3: Path) -> None:
    assert weights_digest(shapes_wan) == weights_digest(shapes_wan)
    assert weights_digest(shapes_wan) != weights_digest(shapes_sd3)


def test_the_digest_tells_what_the_same_weights_are_used_for(shapes_wan: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shapes_wan, tmp_path / "copy"))
    write_info(copy, steps=7)  # is in the settings
    (copy / "README.md").write_text("says nothing to the pipeline")
    found = [weights_digest(copy)]
    assert found == [weights_digest(shapes_wan)]
    names = ("scheduler/scheduler_config.json", "vae/config.json", "tokenizer/merges.txt", "tokenizer/spiece.model")
    for name in names:
        (copy / name).write_text("{}")
        found.append(weights_digest(copy))
    assert len({*found}) == 5
