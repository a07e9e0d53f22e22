"""``dit-accel render`` on a tiny untrained pipeline: files, records, comparison."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_accel import Acceleration
from dit_accel.video import read_metadata, read_video

from .conftest import INFO, PROMPT, Command


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return record


@pytest.mark.parametrize(
    "attention", ["radial", "neighborhood", "adaspa", "block_routing", "compensated", "vmoba", "dense"]
)
def test_video_and_record_are_written(render: Command, tmp_path: Path, attention: str) -> None:
    result = render("--attention", attention, "--seed", 7, "--fps", 12, "--guidance", 2)
    assert result.code == 0, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4"]
    frames, fps = read_video(tmp_path / "out.mp4")
    assert frames.shape == (9, 32, 32, 3) and fps == 12
    record = record_of(tmp_path)
    wanted = {"prompt": PROMPT, "seed": 7, "steps": 2, "frames": 9, "guidance": 2.0, "dtype": "float32"}
    assert wanted.items() <= record.items()
    assert record["attention"]["method"] == attention
    assert (record["acceleration"] is None) == (attention == "dense")
    assert {"torch", "diffusers", "dit_accel", "python", "platform"} <= record["versions"].keys()
    timings = record["timings"]
    assert min(timings.values()) > 0
    assert timings["sampling_s"] + timings["decode_s"] <= timings["total_s"]


@pytest.mark.parametrize("attention", ["radial", "dense"])
def test_sixteen_bits(render: Command, tmp_path: Path, attention: str) -> None:
    result = render("--attention", attention, "--dtype", "bfloat16", "--frames", 17)
    assert result.code == 0, result.err
    assert record_of(tmp_path)["dtype"] == "bfloat16"
    assert read_video(tmp_path / "out.mp4")[0].std() > 0


def test_metadata_in_the_file_is_enough_to_render_again(render: Command, tmp_path: Path) -> None:
    render("--seed", 3)
    settings = read_metadata(tmp_path / "out.mp4")
    record = record_of(tmp_path)
    assert settings.items() <= record.items()
    assert {"prompt", "model", "seed", "steps", "guidance", "attention", "versions"} <= settings.keys()


def test_a_random_seed_is_reported_and_gives_the_same_video(render: Command, tmp_path: Path) -> None:
    printed = render().out
    seed = record_of(tmp_path)["seed"]
    assert f"seed {seed}" in printed
    first, _ = read_video(tmp_path / "out.mp4")
    render("--seed", seed, "--force")
    again, _ = read_video(tmp_path / "out.mp4")
    assert np.array_equal(first, again)
    render("--seed", seed + 1, "--force")
    assert not np.array_equal(first, read_video(tmp_path / "out.mp4")[0])


def test_radial_options_reach_the_method(render: Command, tmp_path: Path) -> None:
    words = "--block 64 --decay 0.5 --rule paper --mask element --dense-steps 1 --dense-layers 1,"
    assert render(*words.split(), "--frames", 17, "--height", 64, "--width", 64).code == 0
    record = record_of(tmp_path)
    chosen = {"block": 64, "decay": 0.5, "rule": "paper", "mask": "element", "dense_steps": 1, "dense_layers": [1]}
    assert chosen.items() <= record["attention"].items()
    sites = {site["path"]: site for site in record["acceleration"]["sites"]}
    assert sites["transformer:blocks.0.attn1"]["sparse_calls"] == 2  # one sparse step, with and without the prompt
    assert sites["transformer:blocks.1.attn1"]["sparse_calls"] == 0
    assert 0 < record["acceleration"]["density"] <= 1
    assert record["acceleration"]["fallbacks"] == {}


def test_a_schedule_reaches_the_method(render: Command, tmp_path: Path) -> None:
    schedule = {"dense_steps": 1, "step_budget": [[0.5, 0.5]], "head_budget": {"1": [1.0, 0.5]}}
    words = ("--attention", "block_routing", "--block", 64, "--compare", "--frames", 17, "--height", 64, "--width", 64)
    result = render(*words, "--schedule", json.dumps(schedule))
    assert result.code == 0, result.err
    record = record_of(tmp_path)
    assert record["attention"]["schedule"] == schedule | {"dense_layers": 1}  # the method's own
    sites = {site["path"]: site for site in record["acceleration"]["sites"]}
    assert sites["transformer:blocks.1.attn1"]["sparse_calls"] == 2


def test_compare_measures_against_dense_from_the_same_noise(render: Command, tmp_path: Path) -> None:
    result = render("--compare", "--dense-steps", 0, "--block", 64, "--frames", 17, "--height", 64, "--width", 64)
    assert result.code == 0, result.err
    names = ["out.compare.mp4", "out.dense.mp4", "out.json", "out.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    measured = record_of(tmp_path)["comparison"]
    assert measured["noise_floor_psnr_db"] == "inf", "two dense runs in one process are bit-equal on a CPU"
    assert 20 < measured["psnr_db"] < 200, "radial differs from dense, but not by much"
    assert 0.5 < measured["ssim"] <= 1
    assert measured["sampling_ratio"] > 0 and measured["total_ratio"] > 0
    assert len(measured["dense_timings"]) == 2
    assert "PSNR" in result.out and "noise floor" in result.out and "wall time" in result.out
    assert read_video(tmp_path / "out.compare.mp4")[0].shape == (17, 64 + 24, 128, 3)
    assert read_metadata(tmp_path / "out.dense.mp4")["attention"] == {"method": "dense"}


def test_the_warm_up_of_compare_follows_a_plan(render: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdaSpa's first search runs dense, so only the step after it shows what sparse steps need."""
    ran: list[int] = []
    remove = Acceleration.remove

    def noted(self: Acceleration) -> None:
        if self._installed:
            ran.append(sum(site.sparse_calls for site in self.report().sites))
        remove(self)

    monkeypatch.setattr(Acceleration, "remove", noted)
    words = ("--steps", 3, "--dense-steps", 1, "--frames", 17, "--height", 64, "--width", 64)
    result = render("--compare", "--attention", "adaspa", *words)
    assert result.code == 0, result.err
    assert ran == [4, 4]  # of 2 layers and 2 branches: the second step of the warm-up, and the third of the run


def test_dense_run_of_compare_is_what_dense_alone_gives(render: Command, tmp_path: Path) -> None:
    render("--compare", "--dense-steps", 0, "--seed", 5)
    compared, _ = read_video(tmp_path / "out.dense.mp4")
    render("--attention", "dense", "--seed", 5, "--force")
    assert np.array_equal(compared, read_video(tmp_path / "out.mp4")[0])


def test_json_prints_the_record(render: Command, tmp_path: Path) -> None:
    result = render("--json")
    assert json.loads(result.out) == record_of(tmp_path)


def test_progress_bar_shows_the_remaining_time(render: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert render("--steps", 3).code == 0
    assert "radial:" in terminal.getvalue()
    assert "/3 [" in terminal.getvalue() and "<" in terminal.getvalue(), "tqdm writes elapsed<remaining"
    assert "decoding" in terminal.getvalue()
    assert "it/s" not in terminal.getvalue(), "the pipeline's own bar is off"


def test_threads_are_set_for_the_run_only(render: Command, tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    assert render("--threads", before + 1).code == 0
    assert record_of(tmp_path)["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_the_shipped_name_brings_its_own_defaults(command: Command, shipped_model: Path, tmp_path: Path) -> None:
    result = command("render", PROMPT, "-o", tmp_path / "out.mp4")
    assert result.code == 0, result.err
    record = record_of(tmp_path)
    assert record["model"] == "shapes-wan"
    sampling = ("frames", "height", "width", "steps", "guidance", "fps")
    assert {name: record[name] for name in sampling} == {name: INFO[name] for name in sampling}
    assert INFO["attention"].items() <= record["attention"].items()
    result = command("render", PROMPT, "-o", tmp_path / "out.mp4", "--force", "--fps", 3, "--decay", 0.5)
    record = record_of(tmp_path)
    assert (record["fps"], record["attention"]["decay"], record["attention"]["block"]) == (3, 0.5, 64)


def test_a_schedule_leaves_the_shipped_defaults_that_it_does_not_name(
    command: Command, shipped_model: Path, tmp_path: Path
) -> None:
    given = {"step_budget": [[0.0, 2.0]], "dense_layers": [1]}
    result = command("render", PROMPT, "-o", tmp_path / "out.mp4", "--schedule", json.dumps(given))
    assert result.code == 0, result.err
    attention = record_of(tmp_path)["attention"]
    assert attention["schedule"] == given | {"dense_steps": INFO["attention"]["dense_steps"]}
    assert attention["decay"] == INFO["attention"]["decay"] and "dense_steps" not in attention


def test_a_folder_of_the_shapes_zoo_does_so_too(command: Command, shipped_model: Path, tmp_path: Path) -> None:
    result = command("render", PROMPT, "-o", tmp_path / "out.mp4", "--model", shipped_model)
    assert result.code == 0, result.err
    assert record_of(tmp_path)["guidance"] == INFO["guidance"]
