"""``shapes.json``: what a pipeline was trained on, and which sentences and words it therefore knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_accel.shapes import MODELS, path
from dit_accel.shapes.info import ModelInfo, read_info
from dit_accel.shapes.world import grammar_words

BASIC = "a red circle moving left on a black background"
RICH = "a small striped red circle circling and a blue square standing still on a gradient gray background"
PICTURE = "a large red circle on a gray background"


def info(**changes: Any) -> ModelInfo:
    content = {
        "subset": "all",
        "motion": True,
        "frames": 33,
        "height": 256,
        "width": 256,
        "steps": 20,
        "guidance": 3.0,
    }
    return ModelInfo(**{**content, **changes})


def image_info() -> ModelInfo:
    return info(motion=False, frames=1)


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_model_says_how_it_is_sampled(name: str) -> None:
    found = read_info(path(name))
    assert found.motion == (found.fps is not None)
    assert found.steps > 0 and found.guidance >= 0 and found.attention["block"] in (64, 128)
    index = json.loads((path(name) / "model_index.json").read_text())
    assert found.motion == index["_class_name"].startswith("Wan")


@pytest.mark.parametrize(
    ("model", "prompt"), [(info(subset="basic"), BASIC), (info(), BASIC), (info(), RICH), (image_info(), PICTURE)]
)
def test_sentences_a_model_knows(model: ModelInfo, prompt: str) -> None:
    model.check_prompt(prompt)


@pytest.mark.parametrize(
    ("model", "prompt", "message"),
    [
        (info(), "a cat", "speaks one sentence"),
        (info(), PICTURE, "makes clips: say how each object moves"),
        (image_info(), BASIC, "makes images: say nothing about motion"),
        (info(subset="basic"), RICH, "one object without size"),
        (info(subset="basic"), BASIC.replace("moving left", "circling"), "moves left, right, up or down"),
        (info(subset="basic"), BASIC.replace("red", "small red"), "without size"),
        (info(subset="basic"), BASIC.replace("on a", "on a gradient"), "plain background"),
    ],
)
def test_sentences_a_model_does_not_know(model: ModelInfo, prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model.check_prompt(prompt)
    assert prompt in str(caught.value)


def test_words_a_model_knows() -> None:
    assert info().words() == grammar_words()
    basic = set(info(subset="basic").words())
    assert {"a", "moving", "left", "triangle", "magenta", "brown", "background"} <= basic
    assert not basic & {"small", "striped", "and", "gradient", "circling", "diagonally", "standing"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"cannot read .*shapes\.json"),
        ("[]", r"cannot read .*shapes\.json"),
        ('{"subset": "basic"}', "missing 6 required positional arguments"),
        (json.dumps({**vars(info()), "colour": 1}), "unexpected keyword argument 'colour'"),
        (json.dumps({**vars(info()), "subset": "hard"}), "choose one of basic, all"),
        (json.dumps({**vars(info()), "motion": False}), "1 frame, not 33"),
    ],
)
def test_a_damaged_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "shapes.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_info(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pipeline_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no shapes\.json.*weights/wan"):
        read_info(tmp_path)


def test_names_of_shipped_models() -> None:
    assert path("wan") == path("shapes-wan")
    with pytest.raises(ValueError, match="choose one of shapes-wan"):
        path("shapes-flux")


@pytest.mark.parametrize("missing", ["model_index.json", "shapes.json"])
def test_missing_weights_are_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.shapes.__file__", str(tmp_path / "__init__.py"))
    folder = tmp_path / "weights" / "wan"
    folder.mkdir(parents=True)
    for name in {"model_index.json", "shapes.json"} - {missing}:
        (folder / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match="reinstall"):
        path("shapes-wan")
