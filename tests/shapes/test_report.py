"""The commands that judge a pipeline: what they render, count, keep and refuse."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from dit_accel.shapes.compare import main as compare
from dit_accel.shapes.info import read_info
from dit_accel.shapes.report.__main__ import main as report
from dit_accel.shapes.report.records import write_json
from dit_accel.shapes.report.sampling import Sample, Sampler
from dit_accel.shapes.report.subsets import calibration_words, chosen_subsets
from dit_accel.shapes.world import SceneWords, is_held_out, parse_prompt, render, sample_scene

DEVICE = ["--device", "cpu"]


def rendered(words: SceneWords, seed: int, frames: int) -> torch.Tensor:
    return render(sample_scene(random.Random(seed), words), frames, 128, 128).video


def traded(words: SceneWords) -> SceneWords:
    """The same colors and shapes, each color on the other object."""
    first, second = words.objects
    swapped = (first._replace(color=second.color), second._replace(color=first.color))
    return words._replace(objects=swapped)


@pytest.fixture
def truthful(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Truth in place of every sample, but prompt 1 goes wrong: one object is shown backwards, two trade their colors.

    Lists the calls.
    """
    calls: list[tuple[int, str]] = []

    def sample(self: Sampler, prompt: str, index: int, attention: str) -> Sample:
        calls.append((index, attention))
        words = parse_prompt(prompt)
        wrong = index == 1
        shown = traded(words) if wrong and len(words.objects) == 2 else words
        video = rendered(shown, index, self.settings.frames)
        if wrong and len(words.objects) == 1:
            video = video.flip(0)
        done = {"density": 0.5, "plan_density": 0.4, "backend": "gather", "fallbacks": {}}
        seconds = 1.0 if attention == "dense" else 0.5
        return Sample(video, 2.0, seconds, None if attention == "dense" else done)

    monkeypatch.setattr(Sampler, "sample", sample)
    return calls


def test_report_counts_resumes_and_draws(
    basic_wan: Path, tmp_path: Path, truthful: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(basic_wan), *DEVICE, "--out", str(tmp_path)]
    assert report([*options, "--prompts", "2"]) == 0
    assert report([*options, "--prompts", "3"]) == 0
    assert truthful == [(0, "dense"), (1, "dense"), (2, "dense")]
    content = json.loads((tmp_path / "shapes.json").read_text())
    assert content["load_seconds"] > 0
    assert content["subsets"].keys() == {"basic"}
    basic = content["subsets"]["basic"]
    assert basic["slots"] == ["color", "shape", "motion", "background", "count"]
    assert basic["accuracy"].keys() == {*basic["slots"], "all"}
    assert basic["accuracy"]["motion"] == {"right": 2, "of": 3, "share": pytest.approx(2 / 3)}
    assert basic["accuracy"]["color"]["right"] == 3
    assert basic["accuracy"]["all"]["right"] == 2
    assert basic["seconds"] == {"median": 2.0, "median_sampling": 1.0, "total": 6.0}
    assert [entry["seed"] for entry in basic["prompts"]] == [0, 1, 2]
    assert content["settings"]["versions"]["torch"] == torch.__version__
    assert (content["settings"]["steps"], content["settings"]["width"]) == (2, 96)  # the model's own
    assert Image.open(tmp_path / "grid.png").width > 3 * 200
    assert "motion      2/3 (66.7%)" in capsys.readouterr().out


def test_a_model_trained_on_everything_is_judged_on_one_and_two_objects(
    shapes_wan: Path, tmp_path: Path, truthful: list[tuple[int, str]]
) -> None:
    options = ["--model", str(shapes_wan), *DEVICE, "--frames", "9", "--prompts", "2"]
    assert report([*options, "--out", str(tmp_path)]) == 0
    assert truthful == [(0, "dense"), (1, "dense")] * 2
    sections = json.loads((tmp_path / "shapes.json").read_text())["subsets"]
    assert list(sections) == ["single", "pair"]
    slots = {"color", "shape", "size", "texture", "motion", "background", "gradient", "count"}
    assert sections["single"]["accuracy"].keys() == {*slots, "all"}
    pair = sections["pair"]["accuracy"]
    assert pair.keys() == {*slots, "all", "bound"}
    assert (pair["bound"]["right"], pair["bound"]["of"]) == (1, 2)  # the second has its colors traded
    assert pair["background"]["right"] == pair["count"]["right"] == 2
    assert [entry["bound"] for entry in sections["pair"]["prompts"]] == [True, False]
    both = Image.open(tmp_path / "grid.png").height
    assert report([*options, "--subset", "single", "--out", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "shapes.json").read_text())["subsets"].keys() == {"single"}
    assert Image.open(tmp_path / "one" / "grid.png").height < both


def test_an_image_model_is_judged_without_motion(
    shapes_sd3: Path, tmp_path: Path, truthful: list[tuple[int, str]]
) -> None:
    assert report(["--model", str(shapes_sd3), *DEVICE, "--prompts", "1", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "shapes.json").read_text())
    assert content["settings"]["pipeline"] == "StableDiffusion3Pipeline"
    for section in content["subsets"].values():
        assert "motion" not in section["accuracy"]
        assert section["accuracy"]["all"]["share"] == 1.0
        assert "moving" not in section["prompts"][0]["prompt"]


def test_how_many_prompts_are_judged_unless_told(shapes_wan: Path, basic_wan: Path, shapes_sd15: Path) -> None:
    found = {
        folder: [(subset.name, len(subset.prompts)) for subset in chosen_subsets(read_info(folder))]
        for folder in (shapes_wan, basic_wan, shapes_sd15)
    }
    assert found[shapes_wan] == found[shapes_sd15] == [("single", 128), ("pair", 64)]
    assert found[basic_wan] == [("basic", 64)]
    (pair,) = chosen_subsets(read_info(shapes_sd15), "pair", 5)
    assert all(len(words.objects) == 2 and words.objects[0].motion is None for words in pair.prompts)


@pytest.mark.parametrize("kind", ["shapes_wan", "basic_wan", "shapes_sd15"])
def test_calibration_has_a_sentence_of_training_that_the_model_knows(
    kind: str, request: pytest.FixtureRequest
) -> None:
    info = read_info(request.getfixturevalue(kind))
    words = calibration_words(info)
    assert words == calibration_words(info) and not is_held_out(words)
    info.check_prompt(words.prompt)


def test_progress_of_other_settings_is_never_mixed_in(
    shapes_wan: Path, tmp_path: Path, truthful: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(shapes_wan), *DEVICE, "--prompts", "1", "--out", str(tmp_path)]
    assert report([*options, "--subset", "single"]) == 0
    assert report([*options, "--subset", "single", "--seed", "7"]) == 2
    assert "seed was 0, is 7" in capsys.readouterr().err
    assert len(truthful) == 1
    assert report(options) == 0
    assert len(truthful) == 2  # only the pair was missing


def test_comparison_takes_turns_and_sums_up(
    basic_wan: Path, tmp_path: Path, truthful: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "radial.json"
    assert compare(["--model", str(basic_wan), *DEVICE, "--prompts", "2", "--out", str(out)]) == 0
    assert truthful == [(0, "dense"), (0, "dense"), (0, "radial"), (1, "radial"), (1, "dense")]
    content = json.loads(out.read_text())
    assert (content["settings"]["subset"], content["settings"]["options"]["block"]) == ("basic", 64)
    assert content["psnr_db"] == {"median": "bit-equal", "min": "bit-equal"}
    assert content["noise_floor_db"] == "bit-equal"
    assert content["motion_ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert content["flicker"]["max"] == 0.0
    assert content["speedup"] == {"median": 2.0, "min": 2.0}
    assert content["density"] == 0.5
    assert content["accuracy"]["radial"]["all"] == content["accuracy"]["dense"]["all"]
    assert content["accuracy"]["radial"]["motion"]["right"] == 1
    assert "motion 1/2" in capsys.readouterr().out


def test_a_comparison_that_goes_on_warms_up_first(
    basic_wan: Path, tmp_path: Path, truthful: list[tuple[int, str]]
) -> None:
    options = ["--model", str(basic_wan), *DEVICE, "--out", str(tmp_path / "radial.json")]
    assert compare([*options, "--prompts", "2"]) == 0
    truthful.clear()
    assert compare([*options, "--prompts", "3"]) == 0
    assert truthful == [(0, "dense"), (2, "dense"), (2, "radial")]
    truthful.clear()
    assert compare([*options, "--prompts", "3"]) == 0
    assert truthful == []


def test_images_are_compared_without_motion(
    shapes_sd15: Path, tmp_path: Path, truthful: list[tuple[int, str]]
) -> None:
    out = tmp_path / "radial.json"
    assert compare(["--model", str(shapes_sd15), *DEVICE, "--prompts", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["settings"]["subset"] == "single"
    assert not {"motion_ratio", "flicker"} & content.keys()


def test_clips_that_stand_still_have_no_motion_ratio(
    shapes_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(self: Sampler, prompt: str, index: int, attention: str) -> Sample:
        video = (
            torch.zeros(5, 3, 64, 64) if attention == "dense" else rendered(parse_prompt(prompt), 0, 5)[..., :64, :64]
        )
        return Sample(video, 2.0, 1.0, {"density": 1.0, "fallbacks": {}})

    monkeypatch.setattr(Sampler, "sample", sample)
    out = tmp_path / "radial.json"
    options = ["--model", str(shapes_wan), *DEVICE, "--subset", "basic", "--prompts", "1", "--out", str(out)]
    assert compare(options) == 0
    content = json.loads(out.read_text())
    assert "motion_ratio" not in content
    assert content["flicker"]["min"] > 0


def test_the_real_pipeline_is_compared_dense_and_sparse(shapes_wan: Path, tmp_path: Path) -> None:
    out = tmp_path / "radial.json"
    options = ["--model", str(shapes_wan), "--frames", "17", "--height", "64", "--width", "128", *DEVICE]
    options += ["--option", "dense_steps=0", "--option", "dense_layers=0", "--subset", "pair"]
    assert compare([*options, "--prompts", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["noise_floor_db"] == "bit-equal"  # the same noise, and nothing left behind by the acceleration
    assert 0 < content["density"] < 1
    assert isinstance(content["psnr_db"]["min"], float)
    assert content["fallbacks"] == {}
    assert content["settings"]["options"]["dense_steps"] == 0
    entry = content["prompts"][0]
    assert 0 < entry["dense"]["sampling_seconds"] < entry["dense"]["seconds"]
    assert "and" in entry["prompt"].split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--subset", "basic", "--prompts", "65"], "cannot take 65 prompts of subset basic"),
        (["--prompts", "0"], "cannot take 0 prompts"),
        (["--frames", "6"], "multiple of 4, plus 1"),
        (["--height", "40"], "--height must be a multiple of 16"),
        (["--steps", "0"], "at least 1"),
        (["--guidance", "nan"], "--guidance"),
        (["--option", "block=64"], "add --attention radial"),
        (["--attention", "radial", "--option", "block"], "NAME=VALUE"),
        (["--attention", "radial", "--option", "sharpness=1"], "sharpness"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_explained(
    options: list[str], message: str, shapes_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(["--model", str(shapes_wan), *options, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--frames", "5"], "makes images: leave out --frames"), (["--subset", "basic"], "basic sentences say a motion")],
)
def test_options_of_clips_are_refused_for_images(
    options: list[str], message: str, shapes_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(["--model", str(shapes_sd15), *options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_a_folder_that_says_nothing_about_its_training_is_named(
    tiny_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(["--model", str(tiny_wan_folder), "--out", str(tmp_path)]) == 2
    assert "holds no shapes.json" in capsys.readouterr().err


def test_written_json_is_readable_and_unchanged(tmp_path: Path) -> None:
    content = {
        "track": [[1.5, -2], [3, 4]],
        "text": "a [b,  c] {d}\n[ e ]",
        "empty": [],
        "names": ["x y", "[z"],
        "n": {},
    }
    write_json(tmp_path / "deep" / "out.json", content)
    text = (tmp_path / "deep" / "out.json").read_text()
    assert json.loads(text) == content
    assert "[1.5, -2]" in text and text.count("\n") > 5
