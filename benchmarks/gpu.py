"""GPU benchmark: first whether sparse attention is right, then how fast it is, then whole transformer steps.

    python benchmarks/gpu.py                          # everything, cut where 9 minutes are over; writes gpu.json
    python benchmarks/gpu.py --only ceilings forward  # some sections; correctness is always checked first
    python benchmarks/gpu.py --smoke                  # every section at toy sizes, on a CPU too; no rates

Needs torch, Triton, diffusers and this package.  Two runs, each with about half of the sections, measure everything.
The file is written after every section, so a run that is cut short keeps what it has.  Exit code 1: something that
would be used is wrong, and no speed was measured.  2: a section broke off, or a kernel that "auto" takes failed its
checks, and all was measured without it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# In the order in which they run, with their weights: each may take its part of the time that is left for it and those
# after it that are asked for.  The checks take what they need.
SECTIONS = {
    "check": 0,
    "ceilings": 2,
    "window": 1,
    "options": 2,
    "forward": 6,
    "planning": 2,
    "backward": 2,
    "models": 8,
}


# Of the kernels that are checked in a process of their own, those that "auto" takes.
AUTOMATIC = ("triton:tma",)


def main() -> int:
    """Runs the sections and returns the exit code."""
    arguments = _parser().parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        print("This benchmark needs a GPU; --smoke runs it at toy sizes without one.", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"environment": environment(device), "smoke": arguments.smoke, "sections": {}}
    sections = result["sections"]
    for name, section in finished_sections(arguments, device):
        sections[name] = section
        result["seconds"] = round(sum(part.get("seconds", 0.0) for part in sections.values()), 1)
        save(arguments.out, result)
        print(f"{name}: {section['status']}, {len(section['rows'])} rows", flush=True)
        if name == "check" and (problem := problem_of(section)):
            print(f"{problem} No speed was measured.", file=sys.stderr)
            return 1
    print(f"written to {arguments.out}")
    left_out = [row["backend"] for row in sections["check"]["rows"] if not row["ok"] and row["backend"] in AUTOMATIC]
    if left_out:
        print(f"Measured without {left_out[0]}, which fails its checks; see there.", file=sys.stderr)
    return 2 if left_out or any(section["status"] == "failed" for section in sections.values()) else 0


def finished_sections(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs one section after the other, each within its share of the budget; the check comes first in any case."""
    from gpu_sections.session import Session

    end = time.monotonic() + arguments.budget_seconds
    session = Session(device, arguments.smoke, end)
    asked = ["check", *(arguments.only or SECTIONS)]
    for name in SECTIONS:
        if name not in asked:
            yield name, {"status": "skipped", "reason": "not asked for", "rows": []}
            continue
        if not arguments.smoke:
            session.deadline = end if name == "check" else share_of(name, asked, time.monotonic(), end)
        if name != "check" and session.left() <= 0:
            yield name, {"status": "skipped", "reason": "the budget was used up before", "rows": []}
            continue
        yield name, run_section(import_module(f"gpu_sections.{name}").run, session)


def share_of(name: str, asked: Collection[str], now: float, end: float) -> float:
    """When a section has to end, so that those after it have time; what one leaves over goes to the others."""
    names = list(SECTIONS)
    weights = sum(SECTIONS[later] for later in names[names.index(name) :] if later in asked)
    return now + (end - now) * SECTIONS[name] / weights


def run_section(rows_of: Callable[[Any], Iterator[dict[str, Any]]], session: Any) -> dict[str, Any]:
    """Collects rows until the section ends, breaks off, or has used up its time."""
    started = time.monotonic()
    section: dict[str, Any] = {"status": "done", "rows": []}
    try:
        for row in rows_of(session):
            section["rows"].append(row)
            print(f"  {json.dumps(row)}", flush=True)
            if session.left() < 0:
                section |= {"status": "cut", "reason": "the time of this section was used up"}
                break
    except Exception as error:
        section |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return section | {"seconds": round(time.monotonic() - started, 1)}


def problem_of(section: dict[str, Any]) -> str | None:
    """What stands against measuring speed after the section of checks, or None.

    Rows with `gate` false are of backends that "auto" never takes, and hold nothing up.
    """
    wrong = [row for row in section["rows"] if not row["ok"] and row.get("gate", True)]
    if wrong:
        return f"Attention is wrong here: {json.dumps(wrong)}"
    if section["status"] == "cut":
        return "The budget ended before the checks did; raise --budget-seconds."
    if section["status"] == "failed" or not section["rows"]:
        return f"The checks broke off: {section.get('reason', 'there are none')}."
    return None


def save(path: Path, result: dict[str, Any]) -> None:
    """Replaces the file as a whole, so that it is never half written; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(path)


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit."""
    facts: dict[str, Any] = {"device": device.type, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "dit-accel"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["commit"] = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version()}
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv")
    return facts


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], help="sections to run after the check")
    parser.add_argument("--budget-seconds", type=float, default=500.0, help="no new case starts after that")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, one repeat, no rates; runs on a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    return parser


if __name__ == "__main__":
    try:
        import dit_accel  # noqa: F401
    except ModuleNotFoundError:
        # A bare checkout works as well; behind everything else, since its folder `kernels` is nobody's package.
        sys.path.append(str(ROOT))
    sys.exit(main())
