"""``dit-accel train-gate`` on a tiny pipeline: what it writes and says, and what it refuses before it starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dit_accel
from dit_accel.gates.files import load_gates

from .conftest import Command, Result

SMALL = ("--frames", 9, "--height", 128, "--width", 128, "--sampling-steps", 2, "--samples", 1)
PROMPTS = ["a cat", "a dog", "", "a cat", "two birds"]


@pytest.fixture
def train(command: Command, tiny_wan_folder: Path, tmp_path: Path) -> Command:
    """Trains for a few steps on two prompts of a file, and measures on a third; later options win."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(*words: object) -> Result:
        out = ("--out", tmp_path / "gates.safetensors", "--prompt-file", tmp_path / "prompts.txt")
        count = ("--prompts", 2, "--held-out", 1, "--steps", 12, "--d-gate", 4)
        return command("train-gate", "--model", tiny_wan_folder, *out, *count, *SMALL, *words)

    return run


def test_it_writes_gates_that_the_model_runs_with(train: Command, tmp_path: Path, tiny_wan_folder: Path) -> None:
    from diffusers import WanPipeline

    result = train("--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["layers"] == {"self": 2} and record["d_gate"] == 4 and record["block"] == 64
    training = record["training"]
    assert training["prompts"] == ["a cat", "a dog"] and training["held_out_prompts"] == ["two birds"]
    assert set(training["held_out_recall"]["sites"]) == {f"transformer:blocks.{i}.attn1" for i in range(2)}
    assert "[3/3] recorded: two birds" in result.err
    gates = load_gates(tmp_path / "gates.safetensors")
    assert gates.training == training and gates.family == record["family"] == "WanTransformer3DModel"
    pipe = WanPipeline.from_pretrained(tiny_wan_folder)
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0, "density": 0.34}
    with dit_accel.accelerate(pipe, "learned_gate", gates=record["file"], **settings) as handle:
        pipe("a cat", height=128, width=128, num_frames=9, num_inference_steps=1, output_type="latent")
        assert handle.report().plan_density == pytest.approx(2 / 3)  # a third of three blocks, rounded up


def test_text_says_what_came_of_it(train: Command, tmp_path: Path) -> None:
    result = train("--teacher", "max")
    assert result.code == 0, result.err
    assert "gates of 2 attention modules of WanTransformer3DModel" in result.out and "pooled scores 0." in result.out
    again = train()
    assert again.code == 2 and "--force" in again.err
    assert load_gates(tmp_path / "gates.safetensors").training["teacher"] == "max"
    assert train("--force").code == 0
    assert load_gates(tmp_path / "gates.safetensors").training["teacher"] == "mass"


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("a pipeline was loaded before the input was checked")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fail)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--out", "gates.bin"], [".safetensors", "gates.bin"]),
        (["--out", "nowhere/gates.safetensors"], ["'nowhere' does not exist"]),
        (["--prompts", "0"], ["--prompts", "from 1 to 200"]),
        (["--prompts", "9"], ["3 different prompts", "need 10"]),
        (["--held-out", "0"], ["--held-out"]),
        (["--steps", "0"], ["--steps", "at least 1"]),
        (["--d-gate", "x"], ["--d-gate", "'x'"]),
        (["--learning-rate", "0"], ["--learning-rate", "above 0"]),
        (["--teacher", "mean"], ["mass", "max"]),
        (["--block", "32"], ["64", "128"]),
        (["--density", "1.5"], ["(0, 1]", "1.5"]),
        (["--samples", "0"], ["--samples"]),
        (["--frames", "10"], ["use 9 or 13"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--model", "nothing"], ["nothing", "shapes-wan"]),
        (["--prompt-file", "nothing.txt"], ["cannot read 'nothing.txt'"]),
    ],
)
def test_input_is_checked_before_loading(train: Command, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    result = train(*words)
    assert result.code == 2 and result.out == ""
    assert all(part in result.err for part in parts) and result.err.count("\n") == 1, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.usefixtures("no_loading")
def test_other_models_need_prompts(command: Command, tiny_wan_folder: Path, tmp_path: Path) -> None:
    result = command("train-gate", "--model", tiny_wan_folder, "--out", tmp_path / "gates.safetensors")
    assert result.code == 2 and "--prompt-file" in result.err


@pytest.mark.usefixtures("no_loading")
def test_models_that_pad_their_text_are_refused(train: Command, tmp_path: Path) -> None:
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    root = "HunyuanVideoTransformer3DModel"
    index = {"_class_name": "HunyuanVideoPipeline", "transformer": ["diffusers", root]}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    result = train("--model", tmp_path / "model")
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert f"is a {root}, which pads its text" in result.err
    assert not (tmp_path / "gates.safetensors").exists()


@pytest.mark.usefixtures("no_loading", "shipped_model")
def test_shapes_models_know_their_sentences(train: Command) -> None:
    result = train("--model", "shapes-wan")
    assert result.code == 2 and "speaks one sentence" in result.err


def test_the_world_gives_sentences_of_its_own(command: Command, shipped_model: Path, tmp_path: Path) -> None:
    from dit_accel.shapes.world import parse_prompt
    from dit_accel.shapes.world.split import is_held_out

    out = tmp_path / "gates.safetensors"
    words: tuple[object, ...] = ("--model", "shapes-wan", "--prompts", 3, "--held-out", 2, "--steps", 2, "--json")
    result = command("train-gate", *words, "--out", out, *SMALL)
    assert result.code == 0, result.err
    training = json.loads(result.out)["training"]
    assert [is_held_out(parse_prompt(prompt)) for prompt in training["prompts"]] == [False] * 3
    assert [is_held_out(parse_prompt(prompt)) for prompt in training["held_out_prompts"]] == [True] * 2
    assert len({*training["prompts"], *training["held_out_prompts"]}) == 5


def test_a_failure_on_the_way_leaves_nothing(train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("the loss was nan at step 3")

    monkeypatch.setattr("dit_accel.gates.distill.train_gates", fail)
    result = train()
    assert result.code == 2 and "nan at step 3" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_help_names_the_command(command: Callable[..., Result]) -> None:
    assert "train-gate" in command("--help").out
    assert "--prompt-file" in command("train-gate", "--help").out
