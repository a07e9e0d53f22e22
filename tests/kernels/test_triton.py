"""The Triton kernel under Triton's interpreter, and that nobody pays for Triton without using it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dit_accel

ROOT = Path(dit_accel.__file__).parents[1]
CASES = (
    "float32_odd_length",
    "float16_blocks_wider_than_tiles",
    "blocks_of_64",
    "unusual_blocks",
    "lists_per_batch_and_head",
    "lists_per_batch",
    "band",
    "band_with_text_and_full_tail",
    "band_without_text_on_whole_blocks",
    "band_of_one_frame",
    "order_of_tokens",
    "padded_head_dims",
    "fused_projection_views",
    "scale_and_lengths",
    "bfloat16_is_refused",
    "unfit_calls_are_refused",
    "auto_does_not_interpret",
)


def run_python(*arguments: str, **variables: str) -> str:
    """Runs a Python of its own in which the package can be imported; returns what it prints."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Results of interpreter_cases.py."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreter_cases.py")
    results: dict[str, str] = json.loads(run_python(str(script), TRITON_INTERPRET="1"))
    return results


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(case: str, interpreted: dict[str, str]) -> None:
    assert interpreted[case] == "ok", interpreted[case]


def test_every_case_is_looked_at(interpreted: dict[str, str]) -> None:
    assert set(interpreted) == set(CASES)


def test_attend_does_not_import_triton() -> None:
    code = "import sys; import dit_accel.kernels.attend; print('triton' in sys.modules)"
    assert run_python("-c", code).strip() == "False"
