"""Bad input ends with one line, exit code 2, and no file."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import INFO, PROMPT, Command, Result


def assert_refused(result: Result, *parts: str, code: int = 2) -> None:
    assert result.code == code, result
    assert result.out == ""
    assert result.err.startswith("dit-accel: error: ")
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    for part in parts:
        assert part in result.err, result.err


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading a model an error: cheap checks come first."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded before the check")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fail)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--steps", "0"], ["--steps", "at least 1", "'0'"]),
        (["--steps", "-3"], ["--steps", "at least 1", "'-3'"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--frames", "10"], ["multiple of 4 plus 1", "use 9 or 13"]),
        (["--frames", "3"], ["use 1 or 5"]),
        (["--height", "40"], ["--height", "multiple of 16", "use 32 or 48"]),
        (["--width", "8"], ["--width", "use 16"]),
        (["--guidance", "nan"], ["--guidance"]),
        (["--fps", "0"], ["--fps", "above 0"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", str(2**63)], ["--seed"]),
        (["--dense-steps", "1.5"], ["--dense-steps", "share"]),
        (["--schedule", "0.5"], ["--schedule", "JSON object", "step_budget", "'0.5'"]),
        (["--schedule", "{", "--attention", "adaspa"], ["--schedule", "JSON object", "'{'"]),
        (["--schedule", '{"budget": 2}'], ["a schedule has no 'budget'"]),
        (["--schedule", '{"step_budget": [[0, 0]]}'], ["step_budget must be a positive number"]),
        (["--schedule", "{}", "--dense-steps", "2"], ["both a schedule and dense_steps were given"]),
        (["--schedule", '{"head_budget": {"0": [1]}}'], ["cannot follow head_budget"]),
        (["--dense-layers", "0,x"], ["--dense-layers"]),
        (["--decay", "0"], ["--decay"]),
        (["--block", "96"], ["64 or 128", "96"]),
        (["--attention", "sparse"], ["radial", "adaspa", "block_routing", "compensated", "dense"]),
        (["--attention", "neighborhood", "--window", "1.5"], ["(0, 1]", "1.5"]),
        (["--attention", "neighborhood", "--window", "wide"], ["--window", "2x8x8", "'wide'"]),
        (["--attention", "neighborhood", "--window", "4", "--stride", "5"], ["stride of 1 to 4"]),
        (["--attention", "neighborhood", "--causal", "2"], ["--causal", "'2'"]),
        (["--attention", "neighborhood", "--dilation", "far"], ["widest or alternate", "'far'"]),
        (["--snap"], ["--snap does nothing", "choose neighborhood"]),
        (["--attention", "adaspa", "--density", "1.5"], ["(0, 1]", "1.5"]),
        (["--attention", "adaspa", "--density", "0.5", "--recall", "0.9"], ["give one of them"]),
        (["--attention", "adaspa", "--search-again", "0.5,x"], ["--search-again", "share of them"]),
        (["--attention", "adaspa", "--drift", "3"], ["(0, 2)", "3"]),
        (["--recall", "0.9"], ["--recall does nothing", "choose adaspa"]),
        (["--attention", "compensated", "--density", "1.5"], ["(0, 1]", "1.5"]),
        (["--attention", "compensated", "--density", "0.5", "--tau", "1"], ["give one of them"]),
        (["--attention", "compensated", "--tau", "nan"], ["standard deviations", "nan"]),
        (["--tau", "1"], ["--tau does nothing", "choose compensated"]),
        (["--attention", "block_routing", "--decay", "1"], ["--decay does nothing", "choose radial"]),
        (["--attention", "vmoba", "--amount", "0.2,0.3"], ["three of these", "0.3"]),
        (["--attention", "vmoba", "--select", "top_p"], ["top_k, threshold"]),
        (["--attention", "vmoba", "--patch", "3x4x5"], ["--patch", "height x width"]),
        (["--score", "mass"], ["--score does nothing", "choose block_routing"]),
        (["--attention", "block_routing", "--amount", "1.5"], ["density in (0, 1]", "1.5"]),
        (["--attention", "block_routing", "--amount", "0"], ["--amount", "above 0"]),
        (["--attention", "block_routing", "--select", "top_p", "--amount", "2"], ["(0, 1]", "2"]),
        (["--attention", "block_routing", "--block", "96"], ["64 or 128", "96"]),
        (["--attention", "block_routing", "--score", "mass", "--head-shared"], ["head_shared", "'pooled'"]),
        (["--attention", "dense", "--block", "64"], ["--block does nothing"]),
        (["--attention", "dense", "--compare"], ["--compare"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--model", "nothing"], ["nothing", "shapes-wan", "folder", "hub id"]),
        (["--model", "./nothing/here"], ["./nothing/here"]),
        (["--model", __file__], ["test_bad_input.py"]),
        (["--comp"], ["--comp"]),
    ],
)
def test_options_are_checked_before_loading(
    render: Command, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    assert_refused(render(*words), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_empty_prompt(render: Command, prompt: str) -> None:
    assert_refused(render(prompt=prompt), "the prompt is empty")


@pytest.mark.usefixtures("no_loading", "shipped_model")
@pytest.mark.parametrize(
    ("prompt", "words", "part"),
    [
        ("a cat", [], "speaks one sentence"),
        ("a mauve circle moving left on a black background", [], "unknown color 'mauve'"),
        ("a red circle on a black background", [], "say how each object moves"),
        ("a small red circle moving left on a black background", [], "one object without size"),
        (PROMPT, ["--negative-prompt", "red elephant"], "'shapes-wan' does not know 'elephant'; it knows a, on,"),
        (PROMPT, ["--negative-prompt", "striped"], "does not know 'striped'"),
    ],
)
def test_words_outside_the_shapes_world(render: Command, prompt: str, words: list[str], part: str) -> None:
    assert_refused(render("--model", "shapes-wan", *words, prompt=prompt), part)


def test_a_model_trained_on_everything_knows_every_sentence(
    command: Command, shipped_model: Path, tmp_path: Path
) -> None:
    (shipped_model / "shapes.json").write_text(json.dumps(INFO | {"subset": "all"}))
    prompt = "a small striped red circle circling and a blue square standing still on a gradient gray background"
    result = command("render", prompt, "-o", tmp_path / "out.mp4", "--negative-prompt", "striped and")
    assert result.code == 0, result.err


@pytest.mark.usefixtures("no_loading")
def test_damaged_facts_about_the_shipped_model(render: Command, shipped_model: Path) -> None:
    (shipped_model / "shapes.json").write_text("{")
    assert_refused(render("--model", "shapes-wan"), "cannot read", "shapes.json", "damaged")


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", ["out.mp4", "out.json", "out.dense.mp4", "out.compare.mp4"])
def test_existing_output_is_kept(render: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    assert_refused(render("--compare"), name, "--force")
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_files_of_a_comparison_do_not_matter_without_one(render: Command, tmp_path: Path) -> None:
    (tmp_path / "out.dense.mp4").write_text("mine")
    assert render("--attention", "dense").code == 0
    assert (tmp_path / "out.dense.mp4").read_text() == "mine"


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("missing/out.mp4", "does not exist"),
        ("file/out.mp4", "does not exist"),
        ("folder.mp4", "is a folder"),
        ("out.avi", ".mp4"),
        ("x" * 250 + ".mp4", "cannot write"),
    ],
)
def test_unwritable_output(render: Command, tmp_path: Path, output: str, part: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    assert_refused(render("-o", tmp_path / output, "--force"), part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.mp4"]


def truncate_weights(model: Path) -> None:
    path = model / "transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def drop_a_tensor(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = model / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["blocks.0.attn1.to_q.weight"]
    save_file(weights, path)


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda model: (model / "model_index.json").unlink(), "no model_index.json"),
    "index is no JSON": (lambda model: (model / "model_index.json").write_text("{"), "damaged"),
    "index is a list": (lambda model: (model / "model_index.json").write_text("[]"), "not a JSON object"),
    "unknown pipeline": (edit_json("model_index.json", _class_name="WonPipeline"), "'WonPipeline', which diffusers"),
    "no class": (edit_json("model_index.json", _class_name=None), "does not know"),
    "image pipeline": (edit_json("model_index.json", _class_name="FluxPipeline"), "makes no videos"),
    "image to video": (
        edit_json("model_index.json", _class_name="WanImageToVideoPipeline"),
        "needs more than a prompt",
    ),
    "unknown transformer": (edit_json("model_index.json", transformer=["diffusers", "WonModel"]), "WonModel"),
    "model of no family": (
        edit_json("model_index.json", transformer=["diffusers", "UNet1DModel"]),
        "UNet1DModel is not a model dit_accel knows",
    ),
    "missing part": (lambda model: (model / "vae").rename(model / "old"), "lacks its folder 'vae'"),
    "truncated weights": (truncate_weights, "cannot load"),
    "missing tensor": (drop_a_tensor, "transformer lack 1 tensors, such as blocks.0.attn1.to_q.weight"),
    "missing weights": (lambda model: (model / "vae/diffusion_pytorch_model.safetensors").unlink(), "cannot load"),
    "other shape": (edit_json("transformer/config.json", num_attention_heads=4), "expected shape"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_model(render: Command, broken_model: Path, tmp_path: Path, kind: str) -> None:
    damage, part = DAMAGE[kind]
    damage(broken_model)
    assert_refused(render("--model", broken_model), part)
    assert list(tmp_path.iterdir()) == []


def test_refusal_by_the_pipeline_itself(render: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("not\nlike this")

    monkeypatch.setattr("diffusers.WanPipeline.check_inputs", refuse)
    assert_refused(render(), "not like this")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ctrl_c_works() -> Iterator[None]:
    """Shells start background jobs with SIGINT ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["diffusers.WanPipeline.encode_prompt", "dit_accel.video.encode_video"])
def test_interrupt_leaves_nothing(
    render: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, ctrl_c_works: None
) -> None:
    def interrupt(*arguments: Any, **__: Any) -> None:
        if where.endswith("video"):
            Path(arguments[0]).write_bytes(b"half")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(where, interrupt)
    result = render()
    assert result.code == 130
    assert "interrupted" in result.err and "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_the_old_files(
    render: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for name in ("out.mp4", "out.json"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr("dit_accel.video.encode_video", full)
    result = render("--force")
    assert result.code == 3
    assert "No space left" in result.err and "Traceback" not in result.err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.mp4": "old", "out.json": "old"}


def test_nan_is_named_not_shown_as_black(render: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    def nan(_: Any, latents: torch.Tensor, **__: Any) -> tuple[torch.Tensor]:
        frames = 4 * (latents.shape[2] - 1) + 1
        return (torch.full((1, 3, frames, 32, 32), float("nan")),)

    monkeypatch.setattr("diffusers.AutoencoderKLWan.decode", nan)
    assert_refused(render(), "NaN", "--dtype")
    assert list(tmp_path.iterdir()) == []


def test_missing_device_is_a_problem_of_the_environment(render: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(render("--device", "cuda"), "usable: cpu", code=3)


def test_missing_weights_of_the_shipped_model(
    render: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dit_accel.shapes.__file__", str(tmp_path / "__init__.py"))
    assert_refused(render("--model", "shapes-wan"), "reinstall", code=3)


def test_missing_pyav(render: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    assert_refused(render(), "pip install av", code=3)


def test_hub_without_network(render: Command) -> None:
    assert_refused(render("--model", "nobody/nothing"), "hub", "network", code=3)


def test_debug_adds_the_traceback(render: Command) -> None:
    result = render("--frames", 10, "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("dit-accel: error: ")


def test_an_unexpected_error_is_one_line_too(render: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("diffusers.WanPipeline.prepare_latents", fail)
    assert_refused(render(), "unexpected RuntimeError: boom", "--debug", code=1)


def test_a_backend_that_cannot_run_here(render: Command, tmp_path: Path) -> None:
    result = render("--backend", "triton", "--device", "cpu")
    assert_refused_last_line(result, "triton backend cannot run here", "--attention dense")
    assert list(tmp_path.iterdir()) == []


def assert_refused_last_line(result: Result, *parts: str) -> None:
    """As :func:`assert_refused`, for errors found after the model was loaded, which may print progress."""
    assert result.code == 2 and result.out == "", result
    last = result.err.rstrip("\n").splitlines()[-1]
    assert last.startswith("dit-accel: error: ") and all(part in last for part in parts), result.err


def test_a_gated_model_is_not_said_to_be_missing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    result = command("render", "a cat", "-o", tmp_path / "a.mp4", "--model", "somebody/gated")
    assert result.code == 3 and "licence" in result.err and "hf auth login" in result.err


def test_a_missing_tokenizer_package_is_no_damaged_folder(render: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("cannot instantiate this tokenizer from a slow version: you need to have sentencepiece")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)
    result = render()
    assert result.code == 3 and "pip install sentencepiece protobuf" in result.err and "damaged" not in result.err
