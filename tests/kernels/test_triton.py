"""The Triton kernel under Triton's interpreter, and that nobody pays for Triton without using it."""

from __future__ import annotations

import pytest

from .interpreter_cases import CASES
from .interpreter_runner import interpreted, run_python


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Results of interpreter_cases.py."""
    pytest.importorskip("triton")
    return interpreted("interpreter_cases")


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_interpreted_kernel(case: str, results: dict[str, str]) -> None:
    assert results[case] == "ok", results[case]


def test_attend_does_not_import_triton() -> None:
    code = "import sys; import dit_accel.kernels.attend; print('triton' in sys.modules)"
    assert run_python("-c", code).strip() == "False"
