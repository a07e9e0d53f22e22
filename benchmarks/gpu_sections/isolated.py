"""Variants for one kind of GPU, checked in a process of their own: they might hang, or leave an error that stays.

Their rows hold nothing up.  If one is not ok, the variant is not run in the process of the benchmark, not by "auto"
either, and all else is measured without it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator

import torch

from dit_accel.kernels.support import Call, check
from dit_accel.kernels.triton_kernels.self_check import refuse
from dit_accel.kernels.triton_kernels.variants import backend_name

from .session import Row, Session

VARIANTS = ("tma", "gluon")
# Seconds for Python's start, a few compilations and a minute in which a kernel may hang.
_PATIENCE = 180.0


def rows(session: Session, variant: str) -> Iterator[Row]:
    """What the other process found, and one row more if it did not end well; none where there is no GPU."""
    if session.device.type != "cuda":
        return
    # Whatever this process has cached, the other one may need.
    torch.cuda.empty_cache()
    yield from judged(session, variant, [sys.executable, "-m", "gpu_sections.isolated", variant])


def judged(session: Session, variant: str, command: list[str]) -> Iterator[Row]:
    """Rows of a command that prints them as lines of JSON; a bad one keeps the variant out of this process."""
    name = backend_name(variant)
    found, problem = _printed(command, min(_PATIENCE, max(30.0, session.left())))
    if problem is not None:
        found.append({"plan": "any", "backend": name, "ok": False, "failed": problem})
    for row in found:
        if not row["ok"]:
            reason = row.get("failed", "its results are wrong, see the checks")
            session.refused[name] = reason
            refuse(variant, _with_index(session.device), reason)
        yield row | {"gate": False}


def _printed(command: list[str], seconds: float) -> tuple[list[Row], str | None]:
    """The lines of JSON that a command prints, and what went wrong with it."""
    # Modules are found where this process finds them, however it was started.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    problem = None
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            problem = f"it was not done after {seconds:.0f} s"
    if problem is None and process.returncode:
        problem = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")], problem


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def main(variant: str) -> None:
    """Prints a row for every case that the variant takes, or one that says why it takes none."""
    from .check import attention_rows

    name, device = backend_name(variant), _with_index(torch.device("cuda"))
    session = Session(device, smoke=False, deadline=math.inf)
    support = check(name, Call("cuda", torch.bfloat16, 128, 128, 128, device_index=device.index))
    case: Row = {"plan": "self-check", "backend": name, "what": "self-check", "ok": support.ok}
    print(json.dumps(case | ({"reason": support.reason} if support.ok else {"failed": support.reason})), flush=True)
    if support.ok:
        for row in attention_rows(session, (name,)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        # The usual way out waits for the GPU, which may be stuck.
        os._exit(1)
