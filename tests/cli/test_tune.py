"""``dit-accel tune`` on a tiny pipeline: what it writes and says, and what it refuses before it starts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from dit_accel.quality import load_profile
from dit_accel.quality.profile import Profile

from .conftest import PROMPT, Command, Result

SMALL = ("--frames", 5, "--height", 16, "--width", 16, "--steps", 9, "--seed", 3, "--threads", 1)
PROMPTS = ("a cat", "a dog")
HELD_OUT = ("--held-out", "two birds", "--held-out", "a fish")


@pytest.fixture
def tune(command: Command, tiny_wan_folder: Path, tmp_path: Path) -> Command:
    """Tunes on two prompts, two others held out; later options win."""

    def run(*words: object, prompts: tuple[str, ...] = PROMPTS, held_out: tuple[str, ...] = HELD_OUT) -> Result:
        out = ("--out", tmp_path / "profile.json")
        return command("tune", *prompts, "--model", tiny_wan_folder, *out, *held_out, *SMALL, *words)

    return run


def test_it_writes_a_profile_and_says_what_was_chosen_and_why(tune: Command, tmp_path: Path) -> None:
    result = tune("--target-psnr", 25, "--worst-only", "--min-speed-up", 0.01)
    assert result.code == 0, result.err
    profile = load_profile(tmp_path / "profile.json")
    assert not profile.is_off and profile.measured["psnr"]["worst"] >= 25
    assert profile.settings["prompts"] == list(PROMPTS) and profile.settings["held_out"] == ["two birds", "a fish"]
    assert profile.settings["seed"] == 3 and profile.settings["coverage"] is None and profile.key.steps == 9
    assert "traced 2/2" in result.err and "noise floor" in result.err
    lines = result.out.splitlines()
    assert lines[0] == "target: PSNR of at least 25 dB" and lines[-1].startswith("wrote ")
    assert any(line.split()[:3] == ["speed", "min", "PSNR"] for line in lines)
    assert any(
        "chosen" in line and profile.spec is not None and line.endswith(profile.spec.describe()) for line in lines
    )
    assert f"chosen: {profile.reason}" in lines
    again = tune("--target-psnr", 25)
    assert again.code == 2 and "--force" in again.err


def test_what_was_interrupted_goes_on(tune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.quality.pairs import Bench, Pair

    stock, kept = Bench.pair, tmp_path / "profile.tuning.jsonl"

    def pair(self: Bench, *given: Any, **named: Any) -> Pair:
        if self.runs["cached"] == 3:
            raise KeyboardInterrupt
        return stock(self, *given, **named)

    words = ("--target-psnr", 25, "--worst-only", "--min-speed-up", 0.01)
    with monkeypatch.context() as cut:
        cut.setattr(Bench, "pair", pair)
        assert tune(*words).code == 130
    assert len(kept.read_text().splitlines()) == 1 + 3 and list(tmp_path.glob("*.json")) == []
    refused = tune(*words, "--seed", 4)
    assert refused.code == 2 and "seed was 3, is 4" in refused.err and kept.exists()
    result = tune(*words)
    assert result.code == 0 and "which has 3; the same call goes on" in result.err
    assert load_profile(tmp_path / "profile.json").settings["generations"]["cached"] > 0
    assert not kept.exists()


def test_off_is_said_aloud_once(tune: Command, tmp_path: Path) -> None:
    result = tune("--target-ssim", 0.9, "--steps", 4)
    assert result.code == 0 and "off: 4 steps are too few" in result.out and "too few" in result.err
    for said in (result.out, result.err):
        assert "--even-few-steps tunes all the same" in said and "force=True" not in said
    assert load_profile(tmp_path / "profile.json").is_off


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What tuning is asked for, in place of doing it."""
    asked: dict[str, Any] = {}

    def note(pipe: Any, **given: Any) -> Profile:
        from dit_accel.quality.key import key_of
        from dit_accel.quality.target import target_from

        asked.update(given)
        names = ("target_psnr", "target_ssim", "max_rel_error", "max_time")
        target = target_from(**{name: given[name] for name in names if name in given})
        return Profile(target, key_of(pipe), None, "it was not tried")

    monkeypatch.setattr("dit_accel.quality.tune", note)
    return asked


def test_options_reach_the_tuning(tune: Command, heard: dict[str, Any]) -> None:
    words = ("--max-rel-error", 0.1, "--coverage", 0.9, "--min-speed-up", 1.2, "--even-few-steps", "--guidance", 3)
    result = tune(*words, "--negative-prompt", "blur", "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["reason"] == "it was not tried" and record["target"] == {"kind": "rel_error", "value": 0.1}
    wanted = {"prompts": list(PROMPTS), "held_out": ["two birds", "a fish"], "coverage": 0.9, "min_speed_up": 1.2,
              "force": True, "seed": 3, "max_rel_error": 0.1, "guidance_scale": 3.0, "negative_prompt": "blur",
              "num_inference_steps": 9, "num_frames": 5, "height": 16, "width": 16}  # fmt: skip
    assert {name: heard.get(name) for name in wanted} == wanted and "prompt" not in heard


def test_sparse_attention_is_tuned_beside_the_cache(
    tune: Command, command: Command, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    """For real; a rendering with the same method takes the profile as its own, and one with another says so."""
    radial = ("--attention", "radial", "--block", 64, "--dense-steps", 2)
    result = tune("--target-psnr", 10, "--worst-only", "--min-speed-up", 0.01, *radial, "--decay", 0.3)
    assert result.code == 0, result.err
    profile = load_profile(tmp_path / "profile.json")
    assert not profile.is_off and "Radial" in profile.key.attention and "decay=0.3" in profile.key.attention

    def told(decay: float) -> list[str]:
        out = ("-o", tmp_path / f"{decay}.mp4", "--profile", tmp_path / "profile.json")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            done = command("render", "a cat", "--model", tiny_wan_folder, *out, *SMALL, *radial, "--decay", decay)
        assert done.code == 0, done.err
        return [str(each.message) for each in found if "profile" in str(each.message)]

    assert told(0.3) == []
    [difference] = told(0.5)
    assert "attention" in difference


def test_the_last_prompts_are_held_out_by_default(tune: Command, heard: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("three\n\nfour\nthree\nfive\n")
    result = tune("--target-psnr", 30, "--prompt-file", tmp_path / "more.txt", prompts=("one", "two"), held_out=())
    assert result.code == 0, result.err
    assert heard["prompts"] == ["one", "two", "three"] and heard["held_out"] == ["four", "five"]


@pytest.mark.usefixtures("shipped_model")
def test_the_world_gives_sentences_of_its_own(command: Command, heard: dict[str, Any], tmp_path: Path) -> None:
    from dit_accel.shapes.world import parse_prompt
    from dit_accel.shapes.world.split import is_held_out

    result = command("tune", "--target-psnr", 28, "-o", tmp_path / "p.json")
    assert result.code == 0, result.err
    assert [is_held_out(parse_prompt(prompt)) for prompt in heard["prompts"]] == [False] * 8
    assert [is_held_out(parse_prompt(prompt)) for prompt in heard["held_out"]] == [True] * 4


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("a pipeline was loaded before the input was checked")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fail)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["exactly one", "--target-psnr", "--max-time", "got 0"]),
        (["--target-psnr", "28", "--max-time", "3"], ["exactly one", "got 2"]),
        (["--target-psnr", "0"], ["--target-psnr", "above 0"]),
        (["--target-psnr", "high"], ["--target-psnr", "'high'"]),
        (["--target-ssim", "1.5"], ["--target-ssim", "(0, 1)", "1.5"]),
        (["--max-rel-error", "1"], ["--max-rel-error", "(0, 1)"]),
        (["--max-time", "-3"], ["--max-time"]),
        (["--target-psnr", "28", "--coverage", "1"], ["--coverage", "[0.5, 1)"]),
        (["--target-psnr", "28", "--min-speed-up", "0"], ["--min-speed-up"]),
        (["--target-psnr", "28", "--out", "profile.txt"], [".json", "profile.txt"]),
        (["--target-psnr", "28", "--out", "nowhere/p.json"], ["'nowhere' does not exist"]),
        (["--target-psnr", "28", "--held-out", "a cat"], ["'a cat' is given twice"]),
        (["--target-psnr", "28", "--held-out", " "], ["empty"]),
        (["--target-psnr", "28", "--prompt-file", "nothing.txt"], ["cannot read 'nothing.txt'"]),
        (["--target-psnr", "28", "--frames", "10"], ["use 9 or 13"]),
        (["--target-psnr", "28", "--device", "abacus"], ["abacus", "cpu"]),
        (["--target-psnr", "28", "--model", "nothing"], ["nothing", "shapes-wan"]),
        (["--target-psnr", "28", "--attention", "wide"], ["--attention", "wide"]),
        (["--target-psnr", "28", "--decay", "0.3"], ["--decay does nothing with --attention dense", "radial"]),
    ],
)
def test_input_is_checked_before_loading(tune: Command, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    result = tune(*words)
    assert result.code == 2 and result.out == ""
    assert all(part in result.err for part in parts) and result.err.count("\n") == 1, result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("prompts", "held_out", "counts"),
    [((), (), "0 and 0"), (("a", "b", "c"), (), "1 and 2"), (("a", "b"), ("--held-out", "c"), "2 and 1")],
)
def test_too_few_prompts(tune: Command, prompts: tuple[str, ...], held_out: tuple[str, ...], counts: str) -> None:
    result = tune("--target-psnr", 28, prompts=prompts, held_out=held_out)
    assert result.code == 2 and counts in result.err and "--prompt-file" in result.err


@pytest.mark.usefixtures("no_loading", "shipped_model")
def test_shapes_models_know_their_sentences(command: Command, tmp_path: Path) -> None:
    words = ("--target-psnr", 28, "-o", tmp_path / "p.json", "--model", "shapes-wan")
    others = [PROMPT.replace("red", color) for color in ("blue", "green")]
    result = command("tune", PROMPT, *others, "a cat", *words)
    assert result.code == 2 and result.err.count("\n") == 1 and "a cat" in result.err


def test_what_the_pipeline_refuses_is_bad_input(
    tune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("target_psnr=28 is beyond the noise floor")

    monkeypatch.setattr("dit_accel.quality.tune", refuse)
    result = tune("--target-psnr", 28)
    assert result.code == 2 and "noise floor" in result.err and list(tmp_path.iterdir()) == []


def test_help_names_the_command(command: Command) -> None:
    assert "tune" in command("--help").out
    assert "--held-out" in command("tune", "--help").out
