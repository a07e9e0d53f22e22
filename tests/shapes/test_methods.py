"""The command that makes the table of methods: what it renders, in which order, what it keeps and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.shapes.methods.__main__ import main
from dit_accel.shapes.methods.contenders import PUBLISHED, contenders
from dit_accel.shapes.methods.runs import MethodBench, MethodSampler
from dit_accel.shapes.report.results import Results
from dit_accel.shapes.report.sampling import Sample
from dit_accel.shapes.world import parse_prompt

from .conftest import Calls, Stop, only
from .test_report import rendered

DEVICE = ["--device", "cpu"]
SOME = ("radial, published", "block_routing, published", "adaspa, published")


@pytest.fixture
def truthful(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Truth in place of every sample, a little darker by sparse methods; dense takes 2 seconds, radial 1, others 4."""
    calls = Calls()

    def sample(self: MethodSampler, prompt: str, index: int, attention: str) -> Sample:
        if len(calls) == calls.last:
            raise Stop
        calls.append((index, attention))
        video = rendered(parse_prompt(prompt), index, self.settings.frames)
        if attention == "dense":
            return Sample(video, 3.0, 2.0, None)
        done = {"density": 0.5, "plan_density": 0.25, "backend": "gather", "fallbacks": {"a": "b"}}
        seconds = 1.0 if attention.startswith("radial") else 4.0
        return Sample(video * 0.9, 5.0, seconds, {**done, "sparse_density": 0.25})

    monkeypatch.setattr(MethodSampler, "sample", sample)
    return calls


def run(model: Path, out: Path, *more: str) -> dict[str, Any]:
    assert main(["--model", str(model), *DEVICE, "--out", str(out), *more]) == 0
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_everyone_renders_every_prompt_and_places_rotate(
    basic_wan: Path, tmp_path: Path, truthful: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    table = run(basic_wan, tmp_path / "m.json", "--prompts", "4", *only(*SOME))
    chosen = [each.name for each in contenders(SOME)]
    everyone = ["dense", *chosen]
    assert truthful[0] == (0, "dense")  # for the noise floor, before anything that counts
    assert truthful[1:4] == [(0, name) for name in chosen]  # looked at, untimed
    timed = truthful[4:]
    assert len(timed) == 4 * 4
    for place in range(4):  # every place is had by everyone once
        assert sorted(timed[4 * index + place][1] for index in range(4)) == sorted(everyone)
    row = table["contenders"][0]
    assert (row["name"], row["runs"], row["group"]) == ("radial, published", 4, PUBLISHED)
    assert row["density"] == {"sparse_calls": 0.25, "all_calls": 0.5}
    assert row["speedup"] == {"median": 2.0, "min": 2.0}
    assert table["contenders"][1]["speedup"]["median"] == 0.5
    assert row["fallbacks"] == {"a": "b"}
    assert table["dense"]["sampling_seconds"] == 2.0
    assert table["noise_floor_db"] == "bit-equal"
    assert row["accuracy"].keys() == {"color", "shape", "motion", "background", "count", "all"}
    assert row["dense_accuracy"]["all"] == {"right": 4, "of": 4, "share": 1.0}
    clips = [rendered(parse_prompt(each["prompt"]), index, 5) for index, each in enumerate(table["prompts"])]
    values = [float(-10 * torch.log10((0.1 * clip).double().square().mean())) for clip in clips]
    assert row["psnr_db"]["mean"] == pytest.approx(sum(values) / 4, abs=0.01)
    assert row["psnr_db"]["min"] == pytest.approx(min(values), abs=0.01)
    assert capsys.readouterr().out == (tmp_path / "m.md").read_text()


def test_a_cut_run_goes_on_where_it_stopped(basic_wan: Path, tmp_path: Path, truthful: Calls) -> None:
    options = ["--prompts", "3", *only(*SOME)]
    whole = run(basic_wan, tmp_path / "whole.json", *options)
    first, second, third = (each.name for each in contenders(SOME))
    assert truthful[12:] == [(2, second), (2, third), (2, "dense"), (2, first)]
    truthful.clear()
    truthful.last = 15
    with pytest.raises(Stop):
        run(basic_wan, tmp_path / "cut.json", *options)
    assert len(json.loads((tmp_path / "cut.json").read_text())["prompts"]) == 2  # written after each prompt
    truthful.last = None
    truthful.clear()
    assert run(basic_wan, tmp_path / "cut.json", *options) == whole
    assert truthful == [(0, "dense"), (2, "dense"), (2, first)]  # the first is a warm-up
    truthful.clear()
    assert run(basic_wan, tmp_path / "cut.json", *options) == whole
    assert truthful == []


def test_on_a_gpu_kernels_are_loaded_before_a_run_that_is_timed(
    basic_wan: Path, tmp_path: Path, truthful: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MethodBench, "_on_gpu", lambda self: True)
    options = ["--prompts", "2", *only(*SOME)]
    first, second, third = (each.name for each in contenders(SOME))
    truthful.last = 8
    with pytest.raises(Stop):
        run(basic_wan, tmp_path / "m.json", *options)
    looked_at, timed = truthful[1:4], truthful[4:]
    assert looked_at == [(0, name) for name in (first, second, third)]  # which loads them, too
    assert timed == [(0, name) for name in ("dense", first, second, third)]
    truthful.last = None
    truthful.clear()
    run(basic_wan, tmp_path / "m.json", *options)
    assert truthful[0] == (0, "dense")
    assert truthful[1:] == [(1, name) for name in (first, first, second, second, third, third, "dense")]


def test_others_stay_in_the_table_and_one_can_be_measured_anew(
    basic_wan: Path, tmp_path: Path, truthful: Calls
) -> None:
    out = tmp_path / "m.json"
    run(basic_wan, out, "--prompts", "1", *only(*SOME[:2]))
    truthful.clear()
    table = run(basic_wan, out, "--prompts", "1", *only(SOME[2]))
    assert [row["name"] for row in table["contenders"] if row["runs"]] == [each.name for each in contenders(SOME)]
    assert {way for _, way in truthful} == {"dense", SOME[2]}  # dense again, for the same minute of the machine
    truthful.clear()
    run(basic_wan, out, "--prompts", "1", *only(SOME[0]), "--forget", SOME[0])
    assert {way for _, way in truthful} == {"dense", SOME[0]}


def test_rows_say_how_many_prompts_they_are_of(basic_wan: Path, tmp_path: Path, truthful: Calls) -> None:
    run(basic_wan, tmp_path / "m.json", "--prompts", "1", *only(*SOME[:2]))
    run(basic_wan, tmp_path / "m.json", "--prompts", "2", *only(SOME[2]))
    lines = (tmp_path / "m.md").read_text().splitlines()
    rows = [next(line for line in lines if line.startswith(f"| {name} |")) for name in ("method", *SOME)]
    assert [row.split(" | ")[-1] for row in rows] == ["prompts |", "1 |", "1 |", "2 |"]


def test_the_table_of_a_file_is_printed_again(
    basic_wan: Path, tmp_path: Path, truthful: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    run(basic_wan, tmp_path / "m.json", "--prompts", "1", *only(SOME[0]))
    printed = capsys.readouterr().out
    truthful.clear()
    assert main(["--table", str(tmp_path / "m.json")]) == 0
    assert capsys.readouterr().out == printed
    assert truthful == []
    assert "| radial, published | 0.250 | 0.500 |" in printed
    assert "### As published" in printed


def test_settings_that_changed_are_rendered_anew(tmp_path: Path) -> None:
    results = Results(tmp_path / "j.jsonl", {"a": 1})
    results.add("run", "radial", {"settings": {"window": (1, 2)}, "psnr_db": 20.0}, 0)
    for kept in (results, Results(tmp_path / "j.jsonl", {"a": 1})):
        found = kept.get("run", "radial", 0, settings={"window": (1, 2)})
        assert found is not None
        assert found["psnr_db"] == 20.0
        assert kept.get("run", "radial", 0, settings={"window": (1, 3)}) is None
        assert kept.get("run", "radial", 1) is None
    results.forget("radial")
    assert Results(tmp_path / "j.jsonl", {"a": 1}).get("run", "radial", 0) is None
    with pytest.raises(ValueError, match="results of other settings"):
        Results(tmp_path / "j.jsonl", {"a": 2})


def test_methods_are_tuned_measured_and_judged_for_real(shapes_wan: Path, tmp_path: Path) -> None:
    sizes = ("--frames", "13", "--height", "128", "--width", "128", "--steps", "3")
    names = ("block_routing", "compensated", "neighborhood, own order", "radial")
    table = run(shapes_wan, tmp_path / "m.json", "--prompts", "1", *sizes, "--subset", "single", *only(*names))
    rows = {row["name"]: row for row in table["contenders"]}
    assert set(rows) == set(names)
    for name in ("block_routing", "compensated"):
        assert rows[name]["density"]["sparse_calls"] == pytest.approx(0.25, abs=0.01)
        assert rows[name]["note"] is None
        assert rows[name]["settings"]["block"] == 64
        assert rows[name]["settings"]["dense_layers"] == 1
    assert rows["compensated"]["recall"] == pytest.approx(rows["block_routing"]["recall"], abs=0.05)
    for row in rows.values():
        assert row["note"] is None or "cannot come nearer to a density of 0.25" in row["note"]
        assert 0 < row["density"]["sparse_calls"] < row["density"]["all_calls"] < 1
        assert row["settings"]["backend"] == "auto"
        assert row["fallbacks"] == {}
        assert row["output_error"] > 0


def test_a_method_that_cannot_act_says_why(shapes_sd3: Path, tmp_path: Path, truthful: Calls) -> None:
    table = run(shapes_sd3, tmp_path / "m.json", "--prompts", "1", *only("radial", "block_routing, published"))
    rows = {row["name"]: row for row in table["contenders"]}
    assert rows["radial"]["note"].startswith("cannot act: ")
    assert rows["radial"]["runs"] == 0
    assert rows["block_routing, published"]["runs"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "radiall"], "nobody is called 'radiall'"),
        (["--forget", "radiall"], "nobody is called 'radiall'"),
        (["--density", "1.5"], "in (0, 1]; got 1.5"),
        (["--density", "0"], "in (0, 1]; got 0"),
        (["--frames", "6"], "--frames must be a multiple of 4, plus 1"),
    ],
)
def test_bad_input_is_named(
    options: list[str], message: str, basic_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(basic_wan), *DEVICE, "--out", str(tmp_path / "m.json"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) or options[0] == "--forget"


def test_a_table_needs_a_place(basic_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(basic_wan), "--out", str(tmp_path / "m.txt")]) == 2
    assert "--out must be a .json file" in capsys.readouterr().err
    assert main(["--table", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
