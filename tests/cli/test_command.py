"""The command as a whole: help, version, exit codes, light imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import dit_accel

from .conftest import Command


@pytest.mark.parametrize("words", [["--help"], ["render", "--help"], ["simulate", "--help"], ["doctor", "--help"]])
def test_help(command: Command, words: list[str]) -> None:
    result = command(*words)
    assert result.code == 0
    assert result.out.startswith("usage: dit-accel")


def test_version(command: Command) -> None:
    assert command("--version").out == f"dit-accel {dit_accel.__version__}\n"


@pytest.mark.parametrize("words", [[], ["dance"], ["render"], ["render", "x"], ["--loud"], ["simulate"]])
def test_usage_errors(command: Command, words: list[str]) -> None:
    result = command(*words)
    assert result.code == 2
    assert result.err.startswith("dit-accel: error: ") and result.err.count("\n") == 1
    assert "--help" in result.err


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "diffusers", "transformers", "triton", "av", "numpy", "PIL", "tqdm", "gradio"]
    code = (
        "import sys; from dit_accel.cli import main; main(['--help']); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dit_accel.cli", "dance"], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 2
    assert "dance" in done.stderr and "Traceback" not in done.stderr
