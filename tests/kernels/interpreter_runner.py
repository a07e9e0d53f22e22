"""Runs files of cases under Triton's interpreter.

Triton decides at import whether kernels are interpreted, and TRITON_INTERPRET changes the whole process.  So a test
calls `interpreted`, which starts this file as a process of its own; that runs the functions in CASES of the named file
and prints one JSON object: case name -> "ok" or what went wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dit_accel

ROOT = Path(dit_accel.__file__).parents[1]


def run_python(*arguments: str, **variables: str) -> str:
    """Runs a Python of its own in which the package can be imported; returns what it prints."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def interpreted(cases: str) -> dict[str, str]:
    """Results of a file of cases beside this one, named without its ending."""
    results: dict[str, str] = json.loads(run_python(__file__, cases, TRITON_INTERPRET="1"))
    return results


def poison() -> None:
    """Makes torch.empty return NaN, so that outputs nobody wrote are found."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    torch.empty = poisoned


def main() -> None:
    """Runs all cases of the file named on the command line."""
    poison()
    results = {}
    for case in importlib.import_module(sys.argv[1]).CASES:
        torch.manual_seed(0)
        try:
            case()
            results[case.__name__] = "ok"
        except Exception:
            results[case.__name__] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
