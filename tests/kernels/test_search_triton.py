"""The search kernels under Triton's interpreter."""

from __future__ import annotations

import pytest

from .interpreter_runner import interpreted
from .search_cases import CASES

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Results of search_cases.py."""
    return interpreted("search_cases")


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_interpreted_kernel(case: str, results: dict[str, str]) -> None:
    assert results[case] == "ok", results[case]
