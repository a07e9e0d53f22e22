"""The CPU benchmark's commands print what their documentation promises."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "cpu.py"
SIZES = ["--tokens", "300", "--heads", "2", "--dim", "16", "--density", "0.5", "--block", "64", "--repeats", "3"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("cpu_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["cpu.py", *options, *SIZES, "--json"])
    script.main()
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attend(
    dtype: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(script, monkeypatch, capsys, "attend", "--dtype", dtype)
    for name in ("dense", "sparse"):
        assert 0 < result[f"{name}_p20_s"] <= result[f"{name}_p50_s"] <= result[f"{name}_p80_s"]
    assert result["speedup"] == pytest.approx(result["dense_p50_s"] / result["sparse_p50_s"])
    assert result["ideal_speedup"] == pytest.approx(1 / result["density"])
    assert result["max_abs_error"] < (1e-5 if dtype == "fp32" else 3e-2)


@pytest.mark.parametrize("score", ["pooled", "lse", "mass"])
def test_plan(
    score: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(script, monkeypatch, capsys, "plan", "--score", score)
    assert result["overhead"] == pytest.approx(result["plan_p50_s"] / result["sparse_p50_s"])
    assert result["benchmark"] == "plan" and result["score"] == score and 0.4 < result["density"] < 0.7


def test_percentiles(script: ModuleType) -> None:
    assert script.percentiles([float(value) for value in range(11)]) == [2.0, 5.0, 8.0]
