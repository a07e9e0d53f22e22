"""``dit-accel profile-blocks`` on a tiny pipeline: what it writes and says, and what it refuses before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dit_accel
from dit_accel.caching.presets.profiling import profiling
from dit_accel.caching.profiling import load_profile

from .conftest import Command, Result

SMALL = ("--frames", 9, "--height", 32, "--width", 32, "--steps", 3)


@pytest.fixture
def profile(command: Command, tiny_wan_folder: Path, tmp_path: Path) -> Command:
    """Profiles the two blocks of the tiny pipeline on one prompt; later options win."""

    def run(*words: object) -> Result:
        out = ("--out", tmp_path / "blocks.json", "--model", tiny_wan_folder)
        return command("profile-blocks", "--prompt", "a cat", *out, *SMALL, "--budget", 0.5, *words)

    return run


def test_it_writes_a_profile_that_the_model_runs_with(profile: Command, tmp_path: Path, tiny_wan_folder: Path) -> None:
    from diffusers import WanPipeline

    result = profile("--json", "--prompt", "a dog", "--at", "0,0.3", "--rows", 8)
    assert result.code == 0, result.err
    record, made = json.loads(result.out), load_profile(tmp_path / "blocks.json")
    assert record["file"] == str(tmp_path / "blocks.json") and record["scores"] == list(made.scores)
    assert made.method == "profile" and made.layers == 2 and len(made.blocks) == 1
    assert made.settings["prompts"] == ["a cat", "a dog"] and made.settings["rows"] == 8
    assert made.settings["at"] == [0, 1] and made.settings["calls"] == 8, "two prompts, two steps, two branches"
    assert (
        made.settings["budget"] == 0.5
        and made.settings["call"]["num_frames"] == 9
        and "[2/2] profiled: a dog" in result.err
    )
    pipe = WanPipeline.from_pretrained(tiny_wan_folder)
    pipe.set_progress_bar_config(disable=True)
    with dit_accel.accelerate(pipe, cache=profiling(record["file"], dense_steps=1)):
        pipe("a cat", height=32, width=32, num_frames=9, num_inference_steps=3, output_type="latent")


def test_text_lists_every_block(profile: Command, tmp_path: Path) -> None:
    result = profile()
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    made = load_profile(tmp_path / "blocks.json")
    assert [line.endswith("background") for line in lines[1:3]] == [block in made.blocks for block in (0, 1)]
    assert f"{made.scores[1]:.4f}" in lines[2] and "of the tokens" in lines[3]
    assert "1 of 2 blocks of WanTransformer3DModel" in lines[4]
    again = profile()
    assert again.code == 2 and "--force" in again.err
    assert profile("--force", "--subject-tokens", "0,1").code == 0
    assert "words=(0, 1)" in load_profile(tmp_path / "blocks.json").settings["mask"]


def test_search_measures_errors(profile: Command, tmp_path: Path) -> None:
    result = profile(
        "--method", "search", "--trials", 0, "--objective", "output", "--schedule", "uniform", "--steps", 8
    )
    assert result.code == 0, result.err
    made = load_profile(tmp_path / "blocks.json")
    assert made.method == "search" and made.blocks == (made.order[0],) and min(made.scores) > 0
    assert "error of the chosen set" in result.out and made.settings["objective"] == "output"
    assert "block 1 alone: error" in result.err


def test_a_speed_up_is_a_budget(command: Command, tiny_wan_folder: Path, tmp_path: Path) -> None:
    words = ("--prompt", "a cat", "--out", tmp_path / "blocks.json", "--model", tiny_wan_folder, *SMALL)
    result = command("profile-blocks", *words, "--steps", 12, "--at", 0, "--speedup", 1.2)
    assert result.code == 0, result.err
    assert len(load_profile(tmp_path / "blocks.json").blocks) == 1, "5 of 12 steps reuse: 1 of 2 blocks saves 5 / 24"
    result = command("profile-blocks", *words, "--force", "--steps", 12, "--at", 0, "--speedup", 9)
    assert result.code == 2 and "at most" in result.err


def test_a_speed_up_depends_on_the_schedule(command: Command, tiny_wan_folder: Path, tmp_path: Path) -> None:
    """Of 13 steps the uniform schedule reuses 5 and the shrinking one 6."""
    words = ("--prompt", "a cat", "--out", tmp_path / "blocks.json", "--model", tiny_wan_folder, *SMALL)
    often = (*words, "--steps", 13, "--at", 0, "--speedup", 1.7)
    result = command("profile-blocks", *often)
    assert result.code == 2 and "at most 1.625" in result.err
    result = command("profile-blocks", *often, "--schedule", "shrinking")
    assert result.code == 0, result.err
    assert len(load_profile(tmp_path / "blocks.json").blocks) == 2


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("a pipeline was loaded before the input was checked")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fail)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--out", "blocks.txt"], [".json", "blocks.txt"]),
        (["--out", "nowhere/blocks.json"], ["'nowhere' does not exist"]),
        (["--budget", "1"], ["(0, 1)", "1"]),
        (["--budget", "0"], ["--budget"]),
        (["--speedup", "2"], ["--budget", "not allowed"]),
        (["--rows", "0"], ["--rows", "at least 1"]),
        (["--at", "3"], ["from 0 to 2"]),
        (["--subject-tokens", "-1"], ["--subject-tokens"]),
        (["--trials", "3"], ["--trials", "choose search"]),
        (["--method", "search", "--rows", "3"], ["--rows", "choose profile"]),
        (["--method", "guess"], ["profile", "search"]),
        (["--schedule", "shrinking"], ["--schedule does nothing with --method profile and a budget", "--speedup"]),
        (["--method", "search"], ["with 3 steps every block is computed at every step", "give more --steps"]),
        (["--method", "search", "--steps", "7", "--schedule", "shrinking"], ["with 7 steps every block"]),
        (["--method", "search", "--steps", "7", "--trials", "0"], ["with 7 steps every block"]),
        (["--prompt", " "], ["empty"]),
        (["--frames", "10"], ["use 9 or 13"]),
        (["--model", "nothing"], ["nothing", "shapes-wan"]),
    ],
)
def test_input_is_checked_before_loading(profile: Command, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    result = profile(*words)
    assert result.code == 2 and result.out == ""
    assert all(part in result.err for part in parts) and result.err.count("\n") == 1, result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_loading", "shipped_model")
def test_shapes_models_know_their_sentences(profile: Command) -> None:
    result = profile("--model", "shapes-wan", "--prompt", "a cat")
    assert result.code == 2 and "speaks one sentence" in result.err
