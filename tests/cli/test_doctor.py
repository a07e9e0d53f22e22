"""``dit-accel doctor``: findings, and that broken parts are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_accel.cli import doctor

from .conftest import Command


def rows(findings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["backend"]: row for row in findings["backends"] if row["device"] == "cpu"}


@pytest.mark.usefixtures("shipped_model")
def test_findings_as_json(command: Command) -> None:
    result = command("doctor", "--json")
    findings = json.loads(result.out)
    assert result.code == 0 and findings["healthy"] and findings["missing"] == []
    assert set(rows(findings)) == {"triton", "gather", "reference", "flex", "xformers"}
    assert all(row["detail"] for row in findings["backends"])
    assert rows(findings)["gather"]["ok"]
    assert findings["versions"]["torch"] and findings["devices"][0].startswith("cpu")
    assert set(findings["extras"]) >= {"triton", "ui", "xformers", "hub"}


@pytest.mark.usefixtures("shipped_model")
def test_findings_as_text(command: Command) -> None:
    out = command("doctor").out
    assert "torch" in out and "cpu gather" in out and "works" in out and "shapes-wan" in out


@pytest.mark.usefixtures("shipped_model")
@pytest.mark.parametrize("failure", ["wrong", "raises"])
def test_a_broken_backend_is_found(command: Command, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    from dit_accel.kernels import attend as module

    original = module.attend

    def broken(*arguments: Any, backend: str, **options: Any) -> Any:
        if backend == "gather" and failure == "raises":
            raise RuntimeError("no such\ninstruction")
        out = original(*arguments, backend=backend, **options)
        return out + 0.5 if backend == "gather" else out

    monkeypatch.setattr(module, "attend", broken)
    gather = rows(json.loads(command("doctor", "--json").out))["gather"]
    assert not gather["ok"]
    assert ("no such instruction" if failure == "raises" else "5.0e-01") in gather["detail"]


def test_missing_weights_and_packages_give_exit_code_3(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Path:
        raise FileNotFoundError(f"the weights of {name!r} are missing")

    monkeypatch.setattr("dit_accel.shapes.path", gone)
    monkeypatch.setattr("dit_accel.cli.doctor.installed", lambda name: None if name == "av" else "1.0")
    result = command("doctor", "--json")
    findings = json.loads(result.out)
    assert result.code == 3 and not findings["healthy"]
    assert findings["missing"] == ["av"]
    assert "weights" in findings["models"]["shapes-wan"]["detail"]


def test_every_shipped_model_is_looked_for(
    command: Command, monkeypatch: pytest.MonkeyPatch, shipped_model: Path
) -> None:
    def one_is_gone(name: str) -> Path:
        if name == "shapes-new":
            raise FileNotFoundError("the weights of 'shapes-new' are missing")
        return shipped_model

    monkeypatch.setattr("dit_accel.shapes.MODELS", {"shapes-wan": "wan", "shapes-new": "new"})
    monkeypatch.setattr("dit_accel.shapes.path", one_is_gone)
    findings = json.loads(command("doctor", "--json").out)
    assert {name: model["ok"] for name, model in findings["models"].items()} == {
        "shapes-wan": True,
        "shapes-new": False,
    }
    assert not findings["healthy"]


@pytest.mark.usefixtures("shipped_model")
def test_a_device_that_runs_nothing_is_a_finding(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows no such device, so that tensors cannot even be put on it; the other device is fine."""
    monkeypatch.setattr("dit_accel.cli.doctor._kinds", lambda: ["cpu", "warp"])
    result = command("doctor", "--json")
    findings = json.loads(result.out)
    assert result.code == 3 and not findings["healthy"]
    assert rows(findings)["gather"]["ok"]
    (row,) = [row for row in findings["backends"] if row["device"] == "warp"]
    assert not row["ok"] and row["detail"].startswith("RuntimeError: ")
    assert any(line.startswith("warp all ") and "unusable" in line for line in command("doctor").out.splitlines())


def test_a_gpu_that_does_not_say_what_it_is_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(index: int) -> None:
        raise RuntimeError("the driver is\ntoo old")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", broken)
    assert "cuda:0 (RuntimeError: the driver is too old)" in doctor._devices()


@pytest.mark.parametrize(
    ("found", "works"),
    [
        ([], False),
        ([("cpu", True), ("cpu", False)], True),
        ([("cpu", True), ("cuda", False)], False),
        ([("cpu", True), ("cuda", False), ("cuda", True)], True),
    ],
)
def test_something_has_to_work_on_every_device(found: list[tuple[str, bool]], works: bool) -> None:
    assert doctor._every_device_works([{"device": device, "ok": ok} for device, ok in found]) is works
