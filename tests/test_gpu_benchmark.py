"""The GPU benchmark as a script: every section at toy sizes, and that it refuses to time what is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RATES = {"tflops", "speedup", "efficiency", "overhead"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the published command writes in smoke mode."""
    out = tmp_path_factory.mktemp("smoke") / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize(
    "name", ["check", "ceilings", "window", "planning", "backward", "models", "options", "forward"]
)
def test_every_section_runs(name: str, smoke: dict[str, Any]) -> None:
    section = smoke["sections"][name]
    assert section["status"] == "done" and section["rows"] and section["seconds"] >= 0
    assert not [row for row in section["rows"] if "failed" in row]
    assert name == "options" or len(section["rows"]) > sum("skipped" in row for row in section["rows"])


def test_toy_sizes_claim_no_speed(smoke: dict[str, Any]) -> None:
    rows = [row for section in smoke["sections"].values() for row in section["rows"]]
    assert smoke["smoke"] and not [row for row in rows if RATES & row.keys()]


def test_the_checks_cover_kinds_and_gradients(smoke: dict[str, Any]) -> None:
    rows = smoke["sections"]["check"]["rows"]
    assert {"random", "banded", "neighborhood", "bitmap", "random, residual"} <= {row["plan"] for row in rows}
    assert any(row.get("what") == "gradients" for row in rows)
    assert all(row["ok"] and row["error"] > 0 for row in rows)


def test_methods_and_models(smoke: dict[str, Any]) -> None:
    wan = [row for row in smoke["sections"]["models"]["rows"] if row["model"] == "toy Wan"]
    assert [row["method"] for row in wan] == ["dense", "radial", "block_routing"]
    assert all(row["density"] < 1 for row in wan[1:])


def test_the_environment_is_on_record(smoke: dict[str, Any]) -> None:
    environment = smoke["environment"]
    assert environment["torch"] == torch.__version__ and {"commit", "triton", "diffusers"} <= environment.keys()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", BENCHMARKS / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "gpu_sections"]:
        del sys.modules[name]


@pytest.mark.slow
def test_kernel_options_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--only", "options", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert "triton:pointer" in {row["backend"] for row in sections["check"]["rows"]}
    rows = sections["options"]["rows"]
    assert len(rows) == 12 and all(row["error"] < 1e-5 for row in rows)
    assert any(row["error"] > 0 for row in rows if row["softmax"] != "online")


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", str(out), *options])
    code = script.main()
    return code, json.loads(out.read_text())


def session(script: ModuleType, left: float) -> Any:
    from importlib import import_module
    from time import monotonic

    return import_module("gpu_sections.session").Session(torch.device("cpu"), True, monotonic() + left)


@pytest.mark.parametrize("fault", ["value", "unwritten", "raises"])
def test_wrong_attention_is_not_timed(
    fault: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import import_module

    check = import_module("gpu_sections.check")
    right = check.attend

    def attend(*args: Any, **options: Any) -> Any:
        if options.get("backend") == "reference":
            return right(*args, **options)
        if fault == "raises":
            raise RuntimeError("launch failed")
        result = right(*args, **options)
        out = result[0] if isinstance(result, tuple) else result
        out[..., -1, 0] = out[..., -1, 0] + 0.1 if fault == "value" else torch.empty_like(out[..., -1, 0])
        return result

    monkeypatch.setattr(check, "attend", attend)
    code, result = run(script, monkeypatch, tmp_path / "gpu.json", "--only", "ceilings")
    assert code == 1 and set(result["sections"]) == {"check"}
    assert not any(row["ok"] for row in result["sections"]["check"]["rows"] if row.get("what") != "gradients")
    assert "No speed was measured" in capsys.readouterr().err


def test_some_sections_only(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = run(script, monkeypatch, tmp_path / "gpu.json", "--only", "ceilings")
    statuses = {name: section["status"] for name, section in result["sections"].items()}
    assert code == 0 and list(statuses) == list(script.SECTIONS)
    assert {name for name, status in statuses.items() if status == "done"} == {"check", "ceilings"}


def test_sections_end_in_time(script: ModuleType) -> None:
    rows = script.run_section(lambda _: iter([{"ok": True}] * 9), session(script, left=-1.0))
    assert rows["status"] == "cut" and len(rows["rows"]) == 1
    assert "raise --budget-seconds" in script.problem_of(rows)


def test_broken_sections_keep_their_rows(script: ModuleType) -> None:
    def rows(_: Any) -> Iterator[dict[str, Any]]:
        yield {"ok": True}
        raise ValueError("no such kernel")

    section = script.run_section(rows, session(script, left=9.0))
    assert section["status"] == "failed" and section["rows"] == [{"ok": True}]
    assert "no such kernel" in section["reason"] and "broke off" in script.problem_of(section)


def test_percentiles(script: ModuleType) -> None:
    made = session(script, left=9.0)
    timing = type(made).__init__.__globals__["Timing"].of([float(value) for value in range(11)])
    assert (timing.p20, timing.p50, timing.p80, timing.repeats) == (2.0, 5.0, 8.0, 11)
