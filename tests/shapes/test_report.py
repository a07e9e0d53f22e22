from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dit_accel.shapes import compare, report
from dit_accel.shapes.evaluate import judge, observe
from dit_accel.shapes.grid import WRONG, draw_grid, middle_frame
from dit_accel.shapes.journal import Journal
from dit_accel.shapes.sampling import Sample, Sampler, accuracy, judged
from dit_accel.shapes.world import Attributes, Scene, held_out_attributes, render

TINY = ["--steps", "2", "--frames", "5", "--height", "64", "--width", "96", "--device", "cpu"]


def rendered(attributes: Attributes) -> torch.Tensor:
    return render(Scene(attributes, 0.2, (0.5, 0.5), 0.4), 5, 64, 96).video


@pytest.fixture
def truthful(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Puts truth in place of every sampled clip, except that prompt 1 moves backwards; lists the calls."""
    calls: list[tuple[int, str]] = []

    def sample(self: Sampler, prompt: str, index: int, attention: str) -> Sample:
        calls.append((index, attention))
        video = rendered(held_out_attributes()[index])
        report = {"density": 0.5, "plan_density": 0.4, "backend": "gather", "fallbacks": {}}
        seconds = 1.0 if attention == "dense" else 0.5
        return Sample(video.flip(0) if index == 1 else video, 2.0, seconds, None if attention == "dense" else report)

    monkeypatch.setattr(Sampler, "sample", sample)
    return calls


def test_report_counts_resumes_and_draws(
    untrained_model: Path, tmp_path: Path, truthful: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(untrained_model), *TINY, "--out", str(tmp_path)]
    assert report.main([*options, "--prompts", "2"]) == 0
    assert report.main([*options, "--prompts", "3"]) == 0
    assert truthful == [(0, "dense"), (1, "dense"), (2, "dense")]
    content = json.loads((tmp_path / "shapes.json").read_text())
    assert content["accuracy"]["motion"] == {"right": 2, "of": 3, "share": pytest.approx(2 / 3)}
    assert content["accuracy"]["color"]["right"] == 3
    assert content["accuracy"]["all"]["right"] == 2
    assert content["seconds"] == {"median": 2.0, "median_sampling": 1.0, "total": 6.0}
    assert [entry["seed"] for entry in content["prompts"]] == [0, 1, 2]
    assert content["settings"]["versions"]["torch"] == torch.__version__
    assert Image.open(tmp_path / "grid.png").width > 3 * 200
    assert "motion      2/3" in capsys.readouterr().out


def test_progress_of_other_settings_is_never_mixed_in(
    untrained_model: Path, tmp_path: Path, truthful: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(untrained_model), *TINY, "--prompts", "1", "--out", str(tmp_path)]
    assert report.main(options) == 0
    assert report.main([*options, "--seed", "7"]) == 2
    assert "seed was 0, is 7" in capsys.readouterr().err
    assert len(truthful) == 1


def test_comparison_takes_turns_and_sums_up(
    untrained_model: Path, tmp_path: Path, truthful: list[tuple[int, str]]
) -> None:
    out = tmp_path / "radial.json"
    assert compare.main(["--model", str(untrained_model), *TINY, "--prompts", "2", "--out", str(out)]) == 0
    assert truthful == [(0, "dense"), (0, "dense"), (0, "radial"), (1, "radial"), (1, "dense")]
    content = json.loads(out.read_text())
    assert content["psnr_db"] == {"median": "bit-equal", "min": "bit-equal"}
    assert content["noise_floor_db"] == "bit-equal"
    assert content["speedup"] == {"median": 2.0, "min": 2.0}
    assert content["density"] == 0.5
    assert content["accuracy"]["radial"]["all"] == content["accuracy"]["dense"]["all"]
    assert content["accuracy"]["radial"]["motion"]["right"] == 1


def test_the_real_pipeline_is_sampled_dense_and_sparse(untrained_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "radial.json"
    options = ["--model", str(untrained_model), "--steps", "2", "--frames", "17", "--height", "64", "--width", "128"]
    options += ["--device", "cpu", "--option", "dense_steps=0", "--option", "dense_layers=0"]
    assert compare.main([*options, "--prompts", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["noise_floor_db"] == "bit-equal"  # the same noise, and nothing left behind by the acceleration
    assert 0 < content["density"] < 1
    assert isinstance(content["psnr_db"]["min"], float)
    assert content["fallbacks"] == {}
    assert content["settings"]["options"]["dense_steps"] == 0
    entry = content["prompts"][0]
    assert 0 < entry["dense"]["sampling_seconds"] < entry["dense"]["seconds"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "65"], "1 to 64"),
        (["--frames", "6"], "multiple of 4, plus 1"),
        (["--height", "40"], "--height must be a multiple of 16"),
        (["--steps", "0"], "at least 1"),
        (["--option", "block=64"], "add --attention radial"),
        (["--attention", "radial", "--option", "block"], "NAME=VALUE"),
        (["--attention", "radial", "--option", "sharpness=1"], "sharpness"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_explained(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([*options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_judgements_are_plain_json() -> None:
    attributes = held_out_attributes()[0]
    for video in (rendered(attributes), torch.zeros(5, 3, 64, 64)):
        judgement = json.loads(json.dumps(judged(video, attributes), allow_nan=False))
        assert judgement["right"] == judge(observe(video), attributes)._asdict()
        assert (judgement["track"] is None) == (judgement["overlap"] is None)
    assert accuracy([judgement])["color"] == {"right": 0, "of": 1, "share": 0.0}


def test_the_grid_marks_wrong_words_only() -> None:
    attributes = held_out_attributes()[0]
    frame = middle_frame(rendered(attributes))
    assert frame.size == (96, 64)
    reds = []
    for video in (rendered(attributes), rendered(attributes).flip(0)):
        sheet = draw_grid([(frame, attributes, judged(video, attributes))])
        colours = sheet.getcolors(sheet.width * sheet.height)
        assert colours is not None
        reds.append(sum(count for count, colour in colours if colour == WRONG))
    assert reds[0] == 0
    assert reds[1] > 20


def test_a_journal_survives_an_interrupted_write(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.jsonl"
    journal = Journal(file, {"seed": 1})
    journal.add(0, {"value": 1})
    journal.add(2, {"value": 3})
    file.write_text(file.read_text() + '{"index": 3, "val')
    again = Journal(file, {"seed": 1})
    assert again.records == {0: {"value": 1}, 2: {"value": 3}}
    again.add(3, {"value": 4})
    assert Journal(file, {"seed": 1}).records[3] == {"value": 4}


@pytest.mark.parametrize("text", ["", "not json\n", "[1]\n", '{"index": 1}\n'])
def test_what_is_no_journal_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match="not a journal"):
        Journal(file, {})
