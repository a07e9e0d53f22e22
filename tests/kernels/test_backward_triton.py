"""The Triton backward kernels under Triton's interpreter."""

from __future__ import annotations

import pytest

from .backward_cases import CASES
from .interpreter_runner import interpreted

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Results of backward_cases.py."""
    return interpreted("backward_cases")


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_interpreted_kernels(case: str, results: dict[str, str]) -> None:
    assert results[case] == "ok", results[case]
