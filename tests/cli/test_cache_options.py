"""``dit-accel render --cache``: options, records, comparison, the picture of the schedule."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dit_accel.caching.presets import PRESETS, settings_of
from dit_accel.cli.cache_options import key_and_value
from dit_accel.quality.key import Key
from dit_accel.quality.profile import Profile
from dit_accel.quality.spec import CacheSpec
from dit_accel.quality.target import Target
from dit_accel.video import read_metadata, read_video

from .conftest import Command

STATIC = ("--cache", "static", "--cache-option", "compute_steps=[0, 2]", "--steps", 4, "--guidance", 2)


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return record


def save_profile(folder: Path, steps: int, **changes: Any) -> Path:
    """A profile of a schedule that computes the first, the middle and the last step."""
    key = Key("WanPipeline", "m", "c", "w", "s", None, "float32", steps=steps)
    spec = CacheSpec(steps, "output", "reuse", computed=(0, steps // 2, steps - 1))
    profile = Profile(**{"target": Target("psnr", 28.0), "key": key, "spec": spec, "reason": "fastest", **changes})
    return profile.save(folder / "mine.json")


def test_a_cache_alone_leaves_attention_dense_and_is_in_the_record(render: Command, tmp_path: Path) -> None:
    result = render(*STATIC)
    assert result.code == 0, result.err
    record = record_of(tmp_path)
    assert record["attention"] == {"method": "dense"}
    assert record["cache"] == {"preset": "static", "compute_steps": [0, 2]}
    (cache,) = record["acceleration"]["caches"]
    assert cache["computed_steps"] == {"transformer": {"cond": [0, 2], "uncond": [0, 2]}}
    assert cache["reused_steps"] == {"transformer": {"cond": [1, 3], "uncond": [1, 3]}}
    assert cache["speed"]["computed_fraction"] == 0.5 and cache["speed"]["predicted"] == 2.0
    assert cache["bytes_most"] > 0 and cache["estimate"]
    assert record["acceleration"]["method"] is None
    assert "of 4 steps 2 computed, 2 reused" in result.out
    assert read_metadata(tmp_path / "out.mp4")["cache"] == record["cache"]


def test_without_a_cache_the_record_says_so(render: Command, tmp_path: Path) -> None:
    assert render().code == 0
    record = record_of(tmp_path)
    assert record["cache"] is None and record["acceleration"]["caches"] == []
    assert record["attention"]["method"] == "radial"


def test_a_cache_beside_a_sparse_method(render: Command, tmp_path: Path) -> None:
    size = ("--frames", 17, "--height", 64, "--width", 64)
    result = render(*STATIC, "--attention", "radial", "--block", 64, "--dense-steps", 1, "--dense-layers", 0, *size)
    assert result.code == 0, result.err
    record = record_of(tmp_path)
    densities = record["acceleration"]["step_densities"]["transformer"]["cond"]
    assert densities["0"] == 1.0 and 0 < densities["2"] <= 1.0 and "1" not in densities
    cells = record["acceleration"]["caches"][0]["rows"][0]["cells"]
    assert [(cell["computed"], cell["density"] is None) for cell in cells] == [
        (True, False), (False, True), (True, False), (False, True)
    ]  # fmt: skip


@pytest.mark.parametrize("attention", [(), ("--attention", "radial", "--block", 64)])
def test_compare_measures_a_cache_alone_and_beside_a_method(
    render: Command, tmp_path: Path, attention: tuple[Any, ...]
) -> None:
    result = render(*STATIC, "--compare", *attention)
    assert result.code == 0, result.err
    record = record_of(tmp_path)
    assert record["comparison"]["noise_floor_psnr_db"] == "inf"
    assert 5 < record["comparison"]["psnr_db"] < 200, "two of four steps reused differ from dense"
    assert len(record["acceleration"]["caches"][0]["computed_steps"]["transformer"]["cond"]) == 2
    assert read_metadata(tmp_path / "out.dense.mp4")["cache"] is None
    render("--attention", "dense", "--steps", 4, "--guidance", 2, "--seed", record["seed"], "--force")
    assert np.array_equal(read_video(tmp_path / "out.dense.mp4")[0], read_video(tmp_path / "out.mp4")[0])


def test_the_schedule_is_drawn(render: Command, tmp_path: Path) -> None:
    result = render(*STATIC, "--schedule-picture", tmp_path / "steps.svg")
    assert result.code == 0, result.err
    root = ElementTree.parse(tmp_path / "steps.svg").getroot()
    titles = [node.text or "" for node in root.findall(".//{*}title")]
    assert sum(title.startswith("step ") for title in titles) == 8
    assert str(tmp_path / "steps.svg") in record_of(tmp_path)["files"]
    again = render(*STATIC, "--schedule-picture", tmp_path / "steps.svg", "-o", tmp_path / "other.mp4")
    assert again.code == 2 and "steps.svg' exists" in again.err
    result = render(*STATIC, "--schedule-picture", tmp_path / "steps.png", "--force")
    assert result.code == 0 and Image.open(tmp_path / "steps.png").width > 500


def test_time_is_split_if_asked_for(render: Command, tmp_path: Path) -> None:
    result = render(*STATIC, "--timed", "--attention", "radial", "--block", 64, "--dense-steps", 1)
    assert result.code == 0, result.err
    report = record_of(tmp_path)["acceleration"]
    split = report["timing"]["split"]
    assert 0 < split["attention"] < split["total"] and 0 < split["cache"] < split["total"]
    assert split["total"] == pytest.approx(split["attention"] + split["cache"] + split["other"])
    assert [(call["step"], call["branch"]) for call in report["timing"]["calls"]][:3] == [
        (0, "cond"), (0, "uncond"), (1, "cond")
    ]  # fmt: skip
    speed = report["caches"][0]["speed"]
    assert 0 < speed["attention_share"] < 1 and speed["sparse_cost"] > 0
    share, cost = speed["attention_share"], speed["sparse_cost"]
    assert speed["predicted"] == pytest.approx(1 / (0.5 * (1 - share + share * cost)))
    assert speed["seconds_reused"] > 0 and speed["seconds_computed"] > 0
    assert "time of the model" in result.out
    assert render("--force").code == 0 and record_of(tmp_path)["acceleration"]["timing"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cache none_such", "there are"),
        ("--cache static --cache-option speed=3", "no setting 'speed'"),
        ("--cache static --cache-option compute_steps", "KEY=VALUE"),
        ("--cache static --cache-option every=2 --cache-option every=3", "more than once"),
        ("--cache static --cache-option every=0", "--cache static"),
        ("--cache-option every=2", "name it by --cache"),
        ("--cache static --profile x.json", "leave one of them out"),
        ("--profile none_such.json", "tune"),
        ("--attention dense --timed", "--cache"),
        ("--schedule-picture x.svg", "--cache or --profile"),
        ("--cache static --cache-option every=2 --schedule-picture x.txt", ".svg or .png"),
        ("--cache static --cache-option every=2 --decay 0.5", "--decay does nothing with --attention dense"),
        ("--cache fbcache --cache-option threshold=-1", "threshold"),
        ("--cache static --cache-option compute_steps=[0,70] --cache-option steps=80", "80"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(render: Command, tmp_path: Path, words: str, said: str) -> None:
    result = render(*words.split(" "))
    assert result.code == 2
    assert said in result.err and len(result.err.strip().splitlines()) == 1, result.err
    assert not list(tmp_path.iterdir())


def test_a_preset_that_does_not_know_the_model_says_so(render: Command, tmp_path: Path) -> None:
    result = render("--cache", "magcache")
    assert result.code == 2 and "no MagCache ratios were published for this WanTransformer3DModel" in result.err
    assert "makes ratios=" in result.err and "model=" in result.err  # though the list of models is cut
    assert not list(tmp_path.iterdir())


def test_values_are_json_or_text() -> None:
    pairs = {"a=0.1": 0.1, "a=[1, 2]": [1, 2], "a=true": True, "a=null": None, "a=wan": "wan", "a=x=y": "x=y"}
    assert {text: key_and_value(text) for text in pairs} == {text: ("a", value) for text, value in pairs.items()}
    assert key_and_value("max-consecutive=2") == ("max_consecutive", 2)


def test_every_preset_is_known_by_name_and_its_settings_are_those_of_its_function() -> None:
    assert {"static", "teacache", "fbcache", "dbcache", "magcache", "easycache"} <= PRESETS.keys()
    for name, preset in PRESETS.items():
        assert "root" not in settings_of(preset) and "-" not in name


def test_a_profile_is_used_and_what_it_was_not_made_for_is_said(render: Command, tmp_path: Path) -> None:
    path = save_profile(tmp_path, 4)
    with pytest.warns(UserWarning, match="measured under other conditions"):
        result = render("--profile", path, "--steps", 4, "--guidance", 2)
    assert result.code == 0, result.err
    record = record_of(tmp_path)
    assert record["cache"] == {"profile": str(path)}
    assert record["acceleration"]["caches"][0]["computed_steps"]["transformer"]["cond"] == [0, 2, 3]


def test_a_profile_for_another_number_of_steps_is_refused(
    render: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded."""
    monkeypatch.delattr("diffusers.DiffusionPipeline.from_pretrained")
    result = render("--profile", save_profile(tmp_path, 5), "--steps", 4)
    assert result.code == 2 and "5 steps" in result.err and "give --steps 5" in result.err
    assert not (tmp_path / "out.mp4").exists()


def test_a_profile_that_is_off_renders_dense_and_says_why(render: Command, tmp_path: Path) -> None:
    path = save_profile(tmp_path, 4, spec=None, reason="nothing was fast enough")
    with pytest.warns(UserWarning, match="nothing was fast enough"):
        result = render("--profile", path, "--steps", 4)
    assert result.code == 0, result.err
    assert record_of(tmp_path)["acceleration"]["caches"] == []


def test_the_schedule_of_a_profile_that_is_off_cannot_be_drawn(
    render: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded."""
    monkeypatch.delattr("diffusers.DiffusionPipeline.from_pretrained")
    path = save_profile(tmp_path, 4, spec=None, reason="nothing was fast enough")
    result = render("--profile", path, "--steps", 4, "--schedule-picture", tmp_path / "steps.svg")
    assert result.code == 2
    assert f"--schedule-picture: the profile '{path}' is off, so there is no schedule to draw" in result.err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("name", ["out.json", "link.json", "folder/../out.json"])
@pytest.mark.parametrize(
    "words",
    [
        ("--profile", "{}"),
        ("--attention", "learned_gate", "--gates", "{}"),
        ("--cache", "profiling", "--cache-option", "background={}"),
    ],
)
def test_a_file_that_is_read_is_not_replaced(
    render: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    name: str,
    force: tuple[str, ...],
) -> None:
    """The record of ``out.mp4`` is ``out.json``."""
    monkeypatch.delattr("diffusers.DiffusionPipeline.from_pretrained")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "out.json").write_text("mine")
    (tmp_path / "link.json").symlink_to("out.json")
    result = render(*(word.format(name) for word in words), *force)
    assert result.code == 2
    assert f"'{name}' is read by this command and would be replaced; choose another --output" in result.err
    assert (tmp_path / "out.json").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "out.json", "link.json"}


def test_a_picture_does_not_replace_what_is_read_either(render: Command, tmp_path: Path) -> None:
    (tmp_path / "steps.svg").write_text("mine")
    result = render("--gates", tmp_path / "steps.svg", "--schedule-picture", tmp_path / "steps.svg", "--force")
    assert result.code == 2 and "choose another --schedule-picture" in result.err
    assert (tmp_path / "steps.svg").read_text() == "mine"


@pytest.mark.parametrize("name", ["model_index.mp4", "transformer/config.mp4"])
def test_no_file_of_the_model_is_replaced(render: Command, tiny_wan_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    record = (folder / name).with_suffix(".json")
    before = record.read_bytes()
    result = render("--model", folder, "--output", folder / name, "--force")
    assert result.code == 2 and f"'{record}' is read by this command and would be replaced" in result.err
    assert record.read_bytes() == before and not (folder / name).exists()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("tune --target-psnr 28", "model_index.json"),
        ("profile-blocks --prompt x", "vae/config.json"),
        ("train-gate", "transformer/diffusion_pytorch_model.safetensors"),
    ],
)
def test_no_file_of_the_model_is_replaced_by_what_is_found_about_it(
    command: Command, tiny_wan_folder: Path, tmp_path: Path, words: str, name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    before = (folder / name).read_bytes()
    result = command(*words.split(), "--model", folder, "--out", folder / name, "--force")
    assert result.code == 2 and "would be replaced; choose another --out" in result.err
    assert (folder / name).read_bytes() == before


def test_compare_refuses_a_cache_that_cannot_act_before_it_renders(
    render: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("the model ran before the cache was refused")

    for name in ("warm_up", "sample"):
        monkeypatch.setattr(f"dit_accel.cli.jobs.{name}", fail)
    result = render("--cache", "magcache", "--compare")
    assert result.code == 2 and "no MagCache ratios were published for this WanTransformer3DModel" in result.err
    assert not list(tmp_path.iterdir())
