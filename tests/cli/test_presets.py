"""Presets and ``--attention auto`` on the command line: who wins, what is recorded, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dit_accel.presets import PRESETS, auto, lookup

from .conftest import INFO, PROMPT, Command


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishes settings of radial attention for the tiny pipeline."""
    one = next(preset for preset in PRESETS if preset.method == "radial")
    tiny = replace(one, name="tiny", config={"num_layers": 2}, settings={"decay": 0.3, "sink": False})
    monkeypatch.setattr(lookup, "PRESETS", (tiny, replace(tiny, name="other", settings={"decay": 0.6}, by_name=True)))


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return record


@pytest.mark.usefixtures("tiny_preset")
@pytest.mark.parametrize(
    ("words", "name", "wanted"),
    [
        ([], "tiny", {"decay": 0.3, "sink": False}),
        (["--preset", "auto", "--decay", "0.5"], "tiny", {"decay": 0.5, "sink": False}),
        (["--preset", "other"], "other", {"decay": 0.6, "sink": True}),
        (["--preset", "none"], None, {"decay": 0.2, "sink": True}),
    ],
)
def test_presets_fill_in_what_is_not_given(
    render: Command, tmp_path: Path, words: list[str], name: str | None, wanted: dict[str, Any]
) -> None:
    result = render(*words)
    assert result.code == 0, result.err
    record = record_of(tmp_path)
    assert record["preset"] == name and wanted.items() <= record["attention"].items()
    reported = record["acceleration"]["preset"]
    assert (reported is None) == (name is None) == ("preset:" not in result.out)
    if name is not None:
        assert reported.startswith(f"{name} (Radial Attention") and reported in result.out
        assert ("but for decay" in reported) == ("--decay" in words)


@pytest.mark.usefixtures("tiny_preset")
def test_settings_that_come_with_a_model_win_over_its_preset(
    command: Command, shipped_model: Path, tmp_path: Path
) -> None:
    result = command("render", PROMPT, "-o", tmp_path / "out.mp4")
    assert result.code == 0, result.err
    record = record_of(tmp_path)
    assert record["attention"]["decay"] == INFO["attention"]["decay"] and record["attention"]["sink"] is False
    assert "but for decay" in record["acceleration"]["preset"]


def test_auto_records_what_it_chose_and_why(render: Command, tmp_path: Path) -> None:
    result = render("--attention", "auto", "--dense-steps", 1, "--dense-layers", "0,1", "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record == record_of(tmp_path)
    wanted = {"method": "auto", "dense_steps": 1, "dense_layers": [0, 1], "presets": True}
    assert wanted.items() <= record["attention"].items()
    choice = record["acceleration"]["choices"]["transformer"]
    assert choice["method"] == "dense" and "2 steps are too few" in choice["reason"]


def test_the_warm_up_of_compare_runs_what_auto_chooses(
    render: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the steps that there will be, not by the one step that is made."""
    made: list[tuple[str, int]] = []
    choose = auto.AutoAttnProcessor.for_situation

    def watched(self: auto.AutoAttnProcessor, at: auto.Situation) -> auto.Choice:
        choice = choose(self, at)
        made.append((choice.method, choice.recipe.schedule.dense_step_count(at.steps) if choice.recipe else -1))
        return choice

    monkeypatch.setattr(auto.AutoAttnProcessor, "for_situation", watched)
    monkeypatch.setattr(auto, "PAYS", 0.0)
    monkeypatch.setattr(auto, "FEW_STEPS", 3)
    result = render("--attention", "auto", "--dense-steps", 2, "--steps", 3, "--compare")
    assert result.code == 0, result.err
    assert made == [("compensated", 0), ("compensated", 2)]  # at once in the warm-up, then as asked
    assert record_of(tmp_path)["comparison"]["noise_floor_psnr_db"] == "inf"


def test_auto_gets_the_settings_that_come_with_a_model(command: Command, shipped_model: Path, tmp_path: Path) -> None:
    result = command("render", PROMPT, "-o", tmp_path / "out.mp4", "--attention", "auto", "--preset", "none")
    assert result.code == 0, result.err
    assert {"usual": INFO["attention"], "presets": False}.items() <= record_of(tmp_path)["attention"].items()


@pytest.mark.parametrize(
    ("usual", "words", "wanted"),
    [
        ({"density": 0.3}, ["--tau", "1.5"], {"tau": 1.5, "density": None}),
        ({"tau": 1.5}, ["--density", "0.3"], {"density": 0.3, "tau": None}),
        ({"dense_steps": 1, "block": 128}, ["--schedule", '{"dense_layers": 0}'], {"dense_steps": 1, "block": 128}),
    ],
)
def test_what_is_given_takes_its_rivals_among_the_settings_of_a_model_along(
    command: Command,
    shipped_model: Path,
    tmp_path: Path,
    usual: dict[str, Any],
    words: list[str],
    wanted: dict[str, Any],
) -> None:
    (shipped_model / "shapes.json").write_text(json.dumps(INFO | {"attention": usual}))
    result = command("render", PROMPT, "-o", tmp_path / "out.mp4", "--attention", "compensated", *words)
    assert result.code == 0, result.err
    assert wanted.items() <= record_of(tmp_path)["attention"].items()


@pytest.mark.usefixtures("tiny_preset")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--preset", "huge"], ["radial has no preset 'huge'", "fit this model: tiny, other"]),
        (["--preset", "tiny", "--attention", "vmoba"], ["vmoba has no preset 'tiny'", "none"]),
        (["--preset", "tiny", "--attention", "auto"], ["belongs to one method"]),
        (["--preset", "tiny", "--attention", "dense"], ["--preset does nothing with --attention dense"]),
        (["--block", "64", "--attention", "auto"], ["--block does nothing with --attention auto"]),
    ],
)
def test_what_does_not_fit_is_refused(render: Command, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    result = render(*words)
    assert result.code == 2 and all(part in result.err for part in parts), result.err
    assert list(tmp_path.iterdir()) == []
