"""A short way to run the command in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dit_accel.cli import main

PROMPT = "a red circle moving left on a black background"
INFO: dict[str, Any] = {
    "subset": "basic",
    "motion": True,
    "frames": 5,
    "height": 32,
    "width": 32,
    "steps": 1,
    "guidance": 2.5,
    "fps": 7,
    "attention": {"dense_steps": 0.3, "dense_layers": 1, "block": 64, "decay": 0.4},
}


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``dit-accel`` with the words given."""

    def run(*words: object) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def render(command: Command, tiny_wan_folder: Path, tmp_path: Path) -> Command:
    """Renders 9 small frames in 2 steps to ``out.mp4`` in the test's folder; later options win."""

    def run(*words: object, prompt: str = PROMPT) -> Result:
        size = ("--steps", 2, "--frames", 9, "--height", 32, "--width", 32)
        return command("render", prompt, "-o", tmp_path / "out.mp4", "--model", tiny_wan_folder, *size, *words)

    return run


@pytest.fixture
def shipped_model(
    tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Puts the tiny pipeline in place of what ships, with a ``shapes.json`` of its own that a test may change."""
    folder = Path(shutil.copytree(tiny_wan_folder, tmp_path_factory.mktemp("shipped") / "model"))
    (folder / "shapes.json").write_text(json.dumps(INFO))
    monkeypatch.setattr("dit_accel.shapes.path", lambda name: folder)
    return folder


@pytest.fixture
def broken_model(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_wan_folder, tmp_path_factory.mktemp("broken") / "model"))
