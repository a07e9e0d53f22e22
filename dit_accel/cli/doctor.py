"""``dit-accel doctor``: what is installed, what works on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .errors import EnvironmentProblem, one_line, with_type
from .kernel_check import examine_kernels, known_warnings_hidden, print_kernels
from .versions import installed, versions

NAME = "doctor"
SUMMARY = "show versions, devices, extras, attention backends and shipped models"
NEEDED = ("torch", "diffusers", "transformers", "av")
EXTRAS = {"triton": ("triton",), "ui": ("gradio",), "xformers": ("xformers",), "hub": ("sentencepiece", "protobuf")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the one option of this command."""
    parser.add_argument(
        "--kernels", action="store_true", help="check every attention backend instead, with errors and configurations"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the findings; exit code 3 if something essential is missing, or nothing works on a device."""
    findings = examine_only_kernels() if options.kernels else examine()
    if options.json:
        print(json.dumps(findings, allow_nan=False))
    elif options.kernels:
        _print_devices(findings)
        print_kernels(findings)
    else:
        _print_findings(findings)
    return 0 if findings["healthy"] else EnvironmentProblem.exit_code


def examine() -> dict[str, Any]:
    """Collects all findings as plain data."""
    from dit_accel.shapes import MODELS

    missing = [name for name in NEEDED if installed(name) is None]
    findings: dict[str, Any] = {
        "versions": {**versions(), "av": installed("av")},
        "missing": missing,
        "extras": {extra: all(map(installed, names)) for extra, names in EXTRAS.items()},
        "models": {name: _shipped_model(name) for name in MODELS},
        "devices": [],
        "backends": [],
    }
    if "torch" not in missing:
        findings["devices"] = _devices()
        findings["backends"] = [row for kind in _kinds() for row in _backends(kind)]
    models = all(model["ok"] for model in findings["models"].values())
    findings["healthy"] = not missing and models and _every_device_works(findings["backends"])
    return findings


def examine_only_kernels() -> dict[str, Any]:
    """Collects the findings of ``--kernels`` as plain data.

    Raises:
        EnvironmentProblem: torch is not installed.
    """
    if installed("torch") is None:
        raise EnvironmentProblem("torch is not installed, so there is no attention to check; run: pip install torch")
    found = {"torch": installed("torch"), "triton": installed("triton")}
    return {"versions": found, "devices": _devices(), **examine_kernels(_kinds())}


def _shipped_model(name: str) -> dict[str, Any]:
    from dit_accel import shapes

    try:
        return {"ok": True, "detail": str(shapes.path(name))}
    except FileNotFoundError as error:
        return {"ok": False, "detail": one_line(error)}


def _kinds() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _devices() -> list[str]:
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        found.append(f"cuda:{index} ({_facts(index)})")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _facts(index: int) -> str:
    """What a GPU is, or why it does not say so."""
    import torch

    try:
        facts = torch.cuda.get_device_properties(index)
    except Exception as failure:  # a GPU may be listed that cannot be used
        return with_type(failure)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}"


def _every_device_works(rows: list[dict[str, Any]]) -> bool:
    """Whether some backend works on each device, and there is a device at all."""
    devices = {row["device"] for row in rows}
    return bool(devices) and devices == {row["device"] for row in rows if row["ok"]}


def _backends(kind: str) -> list[dict[str, Any]]:
    """One row for each backend; a single one if the device cannot even be given a case."""
    try:
        return _tried_backends(kind)
    except Exception as failure:  # a device may be there that runs nothing
        return [{"device": kind, "backend": "all", "ok": False, "detail": with_type(failure)}]


def _tried_backends(kind: str) -> list[dict[str, Any]]:
    """Asks every backend about a small case, and runs those that accept it against the plain reference."""
    import torch

    from dit_accel.kernels.attend import attend, explain
    from dit_accel.plan.radial import radial_plan

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 240, 64, generator=generator).to(kind) for _ in range(3))
    plan = radial_plan((5, 6, 8), block=64, device=kind)
    expected = attend(q, k, v, plan, backend="reference")
    rows = []
    for support in explain(q, k, v, plan):
        row = {"device": kind, "backend": support.backend, "ok": support.ok, "detail": support.reason}
        if support.ok:
            row |= _try_backend(lambda name=support.backend: attend(q, k, v, plan, backend=name), expected)
        rows.append(row)
    return rows


def _try_backend(call: Any, expected: Any) -> dict[str, Any]:
    try:
        with known_warnings_hidden():
            error = (call() - expected).abs().max().item()
    except Exception as failure:  # a diagnosis must survive whatever a backend does
        return {"ok": False, "detail": with_type(failure)}
    return {"ok": error < 1e-2, "detail": f"largest difference from the reference {error:.1e}"}


def _print_devices(findings: dict[str, Any]) -> None:
    for name, version in findings["versions"].items():
        print(f"{name:<14} {version or 'not installed: pip install ' + name}")
    print("\n".join(f"{'device':<14} {device}" for device in findings["devices"]))


def _print_findings(findings: dict[str, Any]) -> None:
    _print_devices(findings)
    for extra, present in findings["extras"].items():
        state = "installed" if present else f'not installed: pip install "dit-accel[{extra}]"'
        print(f"{'extra ' + extra:<14} {state}")
    for row in findings["backends"]:
        print(f"{row['device'] + ' ' + row['backend']:<14} {'works' if row['ok'] else 'unusable'}: {row['detail']}")
    for name, model in findings["models"].items():
        print(f"{name:<14} {'present' if model['ok'] else 'missing'}: {model['detail']}")
