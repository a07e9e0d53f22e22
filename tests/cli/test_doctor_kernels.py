"""``dit-accel doctor --kernels``: errors, configurations and refusals of every attention backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.cli import kernel_check
from dit_accel.kernels.attend import BACKENDS

from .conftest import Command

ROOT = Path(dit_accel.__file__).parents[1]


@pytest.fixture(autouse=True)
def only_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.cli.doctor._kinds", lambda: ["cpu"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def rows(findings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    assert {row["device"] for row in findings["kernels"]} == {"cpu"}
    return {row["backend"]: row for row in findings["kernels"]}


def test_every_backend_as_json(command: Command) -> None:
    result = command("doctor", "--kernels", "--json")
    findings = json.loads(result.out)
    assert result.code == 0 and findings["healthy"]
    assert tuple(row["backend"] for row in findings["kernels"]) == BACKENDS
    assert findings["auto"]["cpu"]["backend"] == "gather" and "not triton" in findings["auto"]["cpu"]["reason"]
    for name in ("gather", "reference", "flex"):
        row = rows(findings)[name]
        assert row["accepted"] and row["ok"] and row["reason"]
        errors = {(check["dtype"], check["head_dim"]): check["max_abs_error"] for check in row["checks"]}
        assert set(errors) == {(dtype, dim) for dtype, dim, _ in kernel_check.CASES}
        # Sixteen bits leave an error behind, so a comparison of a thing with itself would be seen.
        assert errors["float32", 64] < 1e-5 < errors["float16", 128] < errors["bfloat16", 128] < 4e-2
    assert rows(findings)["gather"]["configuration"] == {"threads": str(torch.get_num_threads())}
    triton = rows(findings)["triton"]
    assert not triton["accepted"] and not triton["ok"] and triton["configuration"] == {}
    assert "needs a CUDA" in triton["reason"] or "pip install triton" in triton["reason"]
    assert all(check["max_abs_error"] is None and "refused" in check["detail"] for check in triton["checks"])


def test_every_backend_as_text(command: Command) -> None:
    out = command("doctor", "--kernels").out
    assert "auto on cpu    gather:" in out and "cpu triton     refused:" in out
    assert "cpu gather     works:" in out and "float32, head dim 64: largest difference" in out
    assert "cpu triton:tma        refused:" in out
    assert "threads:" in out and "shapes-wan" not in out


@pytest.mark.parametrize("failure", ["wrong", "not a number", "raises"])
def test_a_broken_backend_is_found(command: Command, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    from dit_accel.kernels import attend as module

    original = module.attend

    def broken(*arguments: Any, backend: str, **options: Any) -> Any:
        out = original(*arguments, backend=backend, **options)
        if backend == "gather" and arguments[0].dtype == torch.bfloat16:
            if failure == "raises":
                raise RuntimeError("no such\ninstruction")
            out[0, 1, -1, 3] += 0.5 if failure == "wrong" else float("nan")
        return out

    monkeypatch.setattr(module, "attend", broken)
    result = command("doctor", "--kernels", "--json")
    findings = json.loads(result.out)
    gather = rows(findings)["gather"]
    assert result.code == 3 and not findings["healthy"], "auto chooses gather"
    assert gather["accepted"] and not gather["ok"] and rows(findings)["reference"]["ok"]
    assert [check["ok"] for check in gather["checks"]] == [True, True, False, False]
    expected = {"wrong": "5.0e-01", "not a number": "NaN or infinity", "raises": "no such instruction"}[failure]
    assert expected in gather["checks"][-1]["detail"]
    assert "cpu gather     wrong:" in command("doctor", "--kernels").out


def test_the_problem_has_every_kind_of_block() -> None:
    plan = kernel_check._plan("cpu")
    assert plan.q_len % plan.block_q and plan.kv_len % plan.block_kv
    assert (plan.full_counts > 0).any() and (plan.full_counts < plan.counts).any()
    assert plan.element_mask().any(-1).all() and 0.1 < plan.density < 0.9
    assert not torch.equal(plan.to_bool()[:, 0], plan.to_bool()[:, 1])


def test_without_torch(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.cli.doctor.installed", lambda name: None)
    result = command("doctor", "--kernels")
    assert result.code == 3 and "pip install torch" in result.err


def test_triton_shows_its_launch_configurations() -> None:
    pytest.importorskip("triton")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "dit_accel.cli", "doctor", "--kernels", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    triton = rows(findings)["triton"]
    assert triton["ok"] and "interpreter" in triton["reason"]
    checks = {(check["dtype"], check["head_dim"]): check for check in triton["checks"]}
    assert checks["float32", 64]["max_abs_error"] < 1e-5 and checks["float16", 128]["ok"]
    assert not checks["bfloat16", 64]["accepted"] and "multiplies bfloat16 wrongly" in checks["bfloat16", 64]["reason"]
    assert len(triton["configuration"]) == 2 * len(kernel_check.HEAD_DIMS)
    assert all("warps" in value for value in triton["configuration"].values())
    assert findings["auto"]["cpu"]["backend"] == "gather"
    found = {row["variant"]: row for row in findings["variants"]}
    assert found["triton:pointer"]["ok"] and found["triton:tma"]["ok"]
    assert found["triton:tma"]["configuration"]["16 bit, head dim 128"] == "128 queries x 128 keys, 4 warps, 2 stages"
    assert not found["triton:gluon"]["ok"] and "cannot be interpreted" in found["triton:gluon"]["reason"]


def test_a_device_that_runs_nothing_is_a_finding(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows no such device, so that tensors cannot even be put on it; the other device is fine."""
    monkeypatch.setattr("dit_accel.cli.doctor._kinds", lambda: ["cpu", "warp"])
    result = command("doctor", "--kernels", "--json")
    findings = json.loads(result.out)
    assert result.code == 3 and not findings["healthy"]
    found = {row["backend"]: row for row in findings["kernels"] if row["device"] == "warp"}
    assert tuple(found) == BACKENDS
    for row in found.values():
        assert not row["accepted"] and not row["ok"] and row["reason"].startswith("RuntimeError: ")
        assert all(check["detail"] == row["reason"] for check in row["checks"])
    assert findings["auto"]["warp"]["backend"] == "none" and findings["auto"]["cpu"]["backend"] == "gather"
    assert not any(row["ok"] for row in findings["variants"] if row["device"] == "warp")
    assert "auto on warp   none: RuntimeError: " in command("doctor", "--kernels").out


def test_what_fails_after_the_checks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError("an illegal memory access\nwas encountered")

    monkeypatch.setattr(kernel_check, "_pointer_tile", broken)
    monkeypatch.setattr("dit_accel.kernels.support.check", broken)
    reason = "RuntimeError: an illegal memory access was encountered"
    assert kernel_check._configuration("triton", "cuda") == {"unknown": reason}
    row = kernel_check._variant("pointer", "cuda")
    assert (row["variant"], row["ok"], row["reason"], row["configuration"]) == ("triton:pointer", False, reason, {})
