"""``dit-accel inspect`` on tiny untrained pipelines: a clip model and a UNet, end to end, and what it refuses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from ..shapes.conftest import build_tiny_sd3, build_tiny_sd15
from .conftest import PROMPT, Command, Result

KEYS = {"format", "settings", "environment", "seconds", "at", "density", "densities", "blocks", "methods"}
KEYS |= {"not_compared", "advice", "layers"}
LAYER = {"path", "kind", "layer", "expert", "grid", "tokens", "text_tokens", "heads", "steps", "calls", "recall"}
LAYER |= {"shares", "frames", "space", "methods", "best", "unlike", "refused"}
SMALL = ("--steps", 3, "--frames", 9, "--height", 32, "--width", 32)


@pytest.fixture
def inspect(command: Command, tiny_wan_folder: Path, tmp_path: Path) -> Command:
    """Inspects the tiny clip model at step 1 of 3 with one method; later options win."""

    def run(*words: object, prompt: str = PROMPT) -> Result:
        usual = (*SMALL, "--at", 1, "--methods", "block_routing", "--seed", 1)
        where = ("--out", tmp_path / "out", "--model", tiny_wan_folder)
        return command("inspect", "--prompt", prompt, *where, *usual, *words)

    return run


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def test_help_names_what_is_written(command: Command) -> None:
    result = command("inspect", "--help")
    assert result.code == 0 and "report.json and report.html" in result.out


def test_a_clip_model(inspect: Command, tmp_path: Path) -> None:
    size = ("--frames", 41, "--height", 128, "--width", 64)  # 11 x 8 x 4 tokens
    result = inspect(*size, "--methods", "block_routing,compensated")
    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    report = report_of(tmp_path / "out")
    assert report.keys() == KEYS and [layer.keys() for layer in report["layers"]] == [LAYER] * 2
    assert report["at"] == [1] and report["settings"]["prompt"] == PROMPT and report["settings"]["steps"] == 3
    assert {"torch", "diffusers", "dit_accel", "machine"} <= report["environment"].keys()
    for number, layer in enumerate(report["layers"]):
        assert (layer["path"], layer["grid"], layer["heads"]) == (f"blocks.{number}.attn1", [11, 8, 4], 2)
        assert layer["steps"] == [1] and layer["unlike"] < 1e-3
        assert len(layer["frames"]["profile"]) == 11 and len(layer["frames"]["by_head"]["rate"]) == 2
        assert layer["methods"].keys() == {"block_routing", "compensated"}
        assert all(len(values) == 2 for found in layer["methods"].values() for values in found.values())
    assert report["advice"]["method"] in ("block_routing", "compensated", None)
    page = (tmp_path / "out" / "report.html").read_text()
    assert PROMPT in page and "data:image/png;base64," in page and "http" not in page
    assert "attention layers with 4 heads" in result.out and "report.html" in result.out


def test_a_unet_of_images(command: Command, tmp_path: Path) -> None:
    build_tiny_sd15().save_pretrained(tmp_path / "model")
    words = ("--model", tmp_path / "model", "--out", tmp_path / "out", "--steps", 2, "--at", 1, "--json")
    result = command("inspect", "--prompt", "a red circle", *words, "--height", 128, "--width", 96)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert "single images" in report["not_compared"]["radial"]
    assert {layer["kind"] for layer in report["layers"]} == {"self"}
    assert all(layer["frames"] is None and layer["shares"]["same_frame"] is None for layer in report["layers"])
    assert all(layer["tokens"] == layer["grid"][1] * layer["grid"][2] for layer in report["layers"])
    assert {"block_routing", "neighborhood"} <= report["layers"][0]["methods"].keys()
    assert report.pop("files") == [str(tmp_path / "out" / name) for name in ("report.json", "report.html")]
    assert report == report_of(tmp_path / "out")
    assert "By distance in space" in (tmp_path / "out" / "report.html").read_text()


def test_joint_attention_has_text(command: Command, tmp_path: Path) -> None:
    build_tiny_sd3().save_pretrained(tmp_path / "model")
    words = ("--model", tmp_path / "model", "--out", tmp_path / "out", "--steps", 2, "--at", 0, "--methods", "none")
    result = command("inspect", "--prompt", "a red circle", *words, "--height", 64, "--width", 64)
    assert result.code == 0, result.err
    (layer,) = report_of(tmp_path / "out")["layers"]
    assert layer["kind"] == "joint" and layer["text_tokens"] > 0
    assert all(0 < share < 1 for share in layer["shares"]["text"])
    assert "No methods were compared" in result.out


def test_sampling_stops_after_the_last_step_looked_at(
    inspect: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import WanTransformer3DModel

    calls: list[int] = []
    real = WanTransformer3DModel.forward

    @functools.wraps(real)
    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(WanTransformer3DModel, "forward", counted)
    assert inspect("--steps", 6, "--at", "0,2", "--guidance", 1).code == 0
    assert len(calls) == 3, "one for each step without guidance"
    assert all(layer["steps"] == [0, 2] for layer in report_of(tmp_path / "out")["layers"])


def test_steps_are_chosen_by_number_and_by_part(inspect: Command, tmp_path: Path) -> None:
    assert inspect("--steps", 6, "--at", "0.5,1").code == 0
    assert report_of(tmp_path / "out")["at"] == [1, 3]


def test_the_same_seed_gives_the_same_figures(inspect: Command, tmp_path: Path) -> None:
    inspect()
    first = report_of(tmp_path / "out")
    assert inspect("--force").code == 0
    again = report_of(tmp_path / "out")
    assert again["layers"] == first["layers"] and again["advice"] == first["advice"]
    assert inspect("--force", "--seed", 2).code == 0
    assert report_of(tmp_path / "out")["layers"] != first["layers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at", "3"], "--at names steps from 0 to 2"),
        (["--at", "1.0"], "--at names steps from 0 to 2"),
        (["--density", "1.5"], "(0, 1]"),
        (["--density", "0"], "above 0"),
        (["--methods", "magic"], "unknown attention method 'magic'"),
        (["--methods", "agent"], "agent"),
        (["--frames", "10"], "9 or 13"),
        (["--device", "warp"], "unknown device 'warp'"),
        (["--model", "nowhere"], "no model 'nowhere' here"),
        (["--attention", "radial"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    inspect: Command, tmp_path: Path, words: list[str], message: str
) -> None:
    result = inspect(*words)
    assert result.code == 2 and message in result.err
    assert result.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_empty_prompt_is_refused(inspect: Command) -> None:
    result = inspect(prompt="  ")
    assert result.code == 2 and "the prompt is empty" in result.err


def test_nothing_is_replaced_without_force(inspect: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("report.html", "report.json"):
        (tmp_path / "out" / name).write_text("mine")
        result = inspect()
        assert result.code == 2 and "--force" in result.err and name in result.err
        assert (tmp_path / "out" / name).read_text() == "mine"
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert inspect().code == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_places_that_cannot_be_written_are_refused_early(inspect: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, message in ((tmp_path / "file", "is a file"), (tmp_path / "no" / "where", "does not exist")):
        result = inspect("--out", place)
        assert result.code == 2 and message in result.err


def test_a_report_that_fails_leaves_nothing(inspect: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Path, *_: object, **__: object) -> int:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", broken)
    result = inspect()
    assert result.code == 3 and "the disk is full" in result.err
    assert not list(tmp_path.iterdir())


def test_nan_is_named(inspect: Command, broken_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = broken_model / "transformer/diffusion_pytorch_model.safetensors"
    weights, name = load_file(path), "blocks.0.attn1.to_v.weight"
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, path)
    result = inspect("--model", broken_model, "--at", 0)
    assert result.code == 2, result.err
    assert "blocks.0.attn1 gave NaN or infinity at step 0; try float32 or bfloat16" in result.err
    assert not list(tmp_path.iterdir())


def test_the_report_has_the_threads_of_the_run(inspect: Command, tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    result = inspect("--threads", before + 1, "--device", "cpu")
    assert result.code == 0, result.err
    assert report_of(tmp_path / "out")["environment"]["machine"].endswith(f", {before + 1} threads")
    assert torch.get_num_threads() == before
