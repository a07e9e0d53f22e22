"""Every attention method and every one of its settings can be asked for by ``dit-accel render``."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from dit_accel.cli.method_options import AUTO, CHOICES, COMMON, METHODS, all_options, options_of
from dit_accel.cli.models import locate
from dit_accel.cli.parser import build_parser
from dit_accel.cli.settings import resolve
from dit_accel.gates.files import save_gates
from dit_accel.presets import AutoAttnProcessor
from dit_accel.processors import ATTENTION

from ..gates.conftest import wan_gates
from .conftest import PROMPT, Command

SEARCHES, SEARCHED = "--search-every 3 --no-compensate", {"search_every": 3, "compensate": False}
EXAMPLES: list[tuple[str, str, dict[str, Any]]] = [  # a method, words, and the settings that they are
    (
        "radial",
        "--decay 0.5 --rule paper --mask element --no-sink --block 64 --backend gather",
        {"decay": 0.5, "rule": "paper", "mask": "element", "sink": False, "block": 64, "backend": "gather"},
    ),
    ("radial", "--dense-steps 0.5 --dense-layers 0,1", {"dense_steps": 0.5, "dense_layers": [0, 1]}),
    (
        "neighborhood",
        "--window 3x4x4 --stride 1x2x2 --dilation 1 --causal 1x0x0 --tile 1x4x4 --snap",
        {
            **{"window": [3, 4, 4], "stride": [1, 2, 2], "dilation": 1},
            **{"causal": [True, False, False], "tile": [1, 4, 4], "snap": True},
        },
    ),
    (
        "adaspa",
        "--density 0.5 --no-levels --search-again 1,0.6 --drift 0.5 --no-cache-lse --compensate",
        {
            **{"density": 0.5, "levels": False, "search_again": [1, 0.6]},
            **{"drift": 0.5, "cache_lse": False, "compensate": True},
        },
    ),
    (
        "adaspa",
        "--recall 0.9 --recall-over head --min-density 0.1 --max-density 0.5",
        {"recall": 0.9, "recall_over": "head", "min_density": 0.1, "max_density": 0.5},
    ),
    (
        "block_routing",
        f"--score pooled --select top_p --amount 0.9 --head-shared --first-frame {SEARCHES}",
        {"score": "pooled", "select": "top_p", "amount": 0.9, "head_shared": True, "first_frame": True, **SEARCHED},
    ),
    (
        "compensated",
        f"--tau 1.5 --variance exact --morton {SEARCHES}",
        {"tau": 1.5, "variance": "exact", "morton": True, **SEARCHED},
    ),
    ("compensated", "--density 0.3", {"density": 0.3}),
    (
        "cluster",
        "--top-p 0.8 --min-kc-ratio 0 --q-clusters 5 --k-clusters 7 --first-iterations 9 --iterations 4 "
        f"--boundaries exact --block 16 {SEARCHES}",
        {
            **{"top_p": 0.8, "min_kc_ratio": 0, "q_clusters": 5, "k_clusters": 7, "first_iterations": 9},
            **{"iterations": 4, "boundaries": "exact", "block": 16, **SEARCHED},
        },
    ),
    ("cluster", "--density 0.3", {"density": 0.3, "top_p": None}),
    (
        "vmoba",
        f"--chunk 2 --patch 2x3 --cube 2x3x4 --select top_k --amount 3,2,1 --scope query --boundaries keep {SEARCHES}",
        {
            **{"chunk": 2, "patch": [2, 3], "cube": [2, 3, 4], "select": "top_k"},
            **{"amount": [3, 2, 1], "scope": "query", "boundaries": "keep", **SEARCHED},
        },
    ),
    (
        "agent",
        "--mode pool --cell 6,3 --merge 0.3 --agent-ratio 0.9,0.4 --switch 3 --max-downsample 4 --no-random "
        "--draw-seed 5 --agents 1x3x2 --second-scale-power 0.5 --shortcut 0.1",
        {
            **{"mode": "pool", "cell": [6, 3], "merge": [0.3, 0.3], "agent_ratio": [0.9, 0.4], "switch": 3},
            **{"max_downsample": 4, "random": False, "seed": 5, "agents": [1, 3, 2]},
            **{"second_scale_power": 0.5, "shortcut": 0.1},
        },
    ),
    ("agent", "--agents 7 --switch 0.25", {"agents": 7, "switch": 0.25}),
    (
        "grid",
        f"--pattern spatial_temporal --density 0.4 --probe-rows 8 --probe-seed 11 --no-first-frame {SEARCHES}",
        {
            **{"pattern": "spatial_temporal", "density": 0.4, "probe_rows": 8, "seed": 11},
            **{"first_frame": False, **SEARCHED},
        },
    ),
    ("grid", "--probe-seed even", {"seed": None, "first_frame": None}),
    ("grid", "--pattern stride --multiples 1,3", {"pattern": "stride", "multiples": [1, 3]}),
    ("learned_gate", f"--gates GATES --density 0.4 {SEARCHES}", {"density": 0.4, **SEARCHED}),
    ("learned_gate", "--gates GATES --threshold 0.01", {"threshold": 0.01, "density": None}),
]


@pytest.fixture
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random gates of the tiny pipeline."""
    path = tmp_path_factory.mktemp("gates") / "tiny.safetensors"
    save_gates(wan_gates(), path)
    return path


def parsed(words: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(["render", PROMPT, "-o", "out.mp4", *words])


def test_every_method_can_be_chosen() -> None:
    assert set(METHODS) == set(ATTENTION)
    assert (*METHODS, "auto", "dense") == CHOICES
    parser = build_parser()
    for name in CHOICES:
        assert parser.parse_args(["render", PROMPT, "-o", "out.mp4", "--attention", name]).attention == name


@pytest.mark.parametrize("method", ATTENTION)
def test_every_setting_has_one_option(method: str) -> None:
    settings = [each.setting or each.name for each in options_of(method)]
    assert sorted(settings) == sorted(inspect.signature(ATTENTION[method]).parameters)


def test_auto_has_what_all_methods_have() -> None:
    inner = {"presets", "usual"}  # --preset, and what comes with a model
    assert {*AUTO} == set(inspect.signature(AutoAttnProcessor).parameters) - inner
    assert {each.name for each in options_of("auto")} == {*AUTO} and options_of("dense") == ()


def test_options_are_declared_once_and_none_unless_given() -> None:
    names = [each.name for each in all_options()]
    assert len(set(names)) == len(names)
    options = parsed([])
    assert [getattr(options, name) for name in names] == [None] * len(names)


@pytest.mark.parametrize("method", ATTENTION)
def test_every_option_has_an_example(method: str) -> None:
    lines = [words for name, words, _ in EXAMPLES if name == method]
    shown = {word.replace("--no-", "--") for words in lines for word in words.split()}
    assert {each.flag for each in options_of(method) if each not in COMMON} <= shown


@pytest.mark.parametrize(("method", "words", "wanted"), EXAMPLES)
def test_options_reach_the_method(
    tiny_wan_folder: Path, gates: Path, method: str, words: str, wanted: dict[str, Any]
) -> None:
    given = words.replace("GATES", str(gates)).split()
    options = parsed(["--model", str(tiny_wan_folder), "--attention", method, *given])
    settings = resolve(options, locate(options.model)).method
    assert json.loads(json.dumps(settings)) == settings
    assert {name: settings[name] for name in wanted} == wanted
    if method == "learned_gate":
        assert settings["gates"] == str(gates)


@pytest.mark.parametrize("words", ["cluster", "agent", "grid", "grid --pattern stride", "learned_gate --gates GATES"])
def test_render(render: Command, tmp_path: Path, gates: Path, words: str) -> None:
    given = words.replace("GATES", str(gates)).split()
    result = render("--attention", *given, "--dense-steps", 0, "--dense-layers", 1)
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "out.json").read_text())
    report = record["acceleration"]
    assert record["attention"]["method"] == given[0]
    assert 0 < report["density"] <= 1 and report["fallbacks"] == {}
    calls = {site["path"]: site["sparse_calls"] for site in report["sites"]}
    assert calls["transformer:blocks.0.attn1"] == 0
    assert calls["transformer:blocks.1.attn1"] == 4, "two steps, with and without the prompt"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--agents 4", ["--agents does nothing with --attention radial", "choose agent"]),
        ("--probe-seed 3 --attention agent", ["--probe-seed does nothing with --attention agent", "choose grid"]),
        ("--draw-seed 3 --attention grid", ["--draw-seed does nothing", "choose agent"]),
        ("--density 0.5 --attention agent", ["choose adaspa or compensated or cluster or grid or learned_gate"]),
        ("--gates x --attention auto", ["--gates does nothing with --attention auto", "choose learned_gate"]),
        ("--top-p 0.5 --density 0.5 --attention cluster", ["give it, or top_p"]),
        ("--boundaries exact --attention vmoba", ["'exact'"]),
        ("--boundaries cut --attention cluster", ["'keep' or 'exact'", "'cut'"]),
        ("--mode merge --attention agent", ["mode='merge' is for UNets", "mode='pool'"]),
        ("--agents 2x2 --attention agent", ["--agents", "frames x height x width", "'2x2'"]),
        ("--agents 0 --attention agent", ["--agents", "at least 1", "'0'"]),
        ("--cell 4,2,1 --attention agent", ["--cell", "early and later steps", "'4,2,1'"]),
        ("--merge 1 --attention agent", ["merge takes numbers in [0, 1)", "1.0"]),
        ("--probe-seed odd --attention grid", ["--probe-seed", "or give even", "'odd'"]),
        ("--multiples 1,0 --attention grid", ["--multiples", "at least 1", "'0'"]),
        ("--pattern stride --first-frame --attention grid", ["first_frame"]),
        ("--gates missing --attention learned_gate", ["no gates at 'missing'", "dit-accel train-gate"]),
        ("--threshold 0.1 --density 0.5 --attention learned_gate", ["two rules"]),
    ],
)
def test_what_does_not_fit_is_refused_before_loading(
    render: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, parts: list[str]
) -> None:
    monkeypatch.delattr("diffusers.DiffusionPipeline.from_pretrained")
    result = render(*words.split())
    assert result.code == 2 and all(part in result.err for part in parts), result.err
    assert list(tmp_path.iterdir()) == []


def test_help_has_a_group_for_every_method(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = command("render", "--help").out.splitlines()
    assert lines[0] == "usage: dit-accel render PROMPT -o OUT.mp4 [options]" and lines[1] == ""
    at = [lines.index(f"--attention {name}:") for name in METHODS]
    assert at == sorted(at)
    ends = [*at[1:], lines.index("machine:")]
    for method, start, end in zip(METHODS.values(), at, ends, strict=True):
        assert lines[start + 1].strip() == method.summary
        text = "\n".join(lines[start:end])
        assert all(f"  {each.flag}" in text for each in method.own)
