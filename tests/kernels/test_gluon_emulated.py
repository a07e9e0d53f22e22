"""The Gluon kernel's own source, run by an emulation of the Gluon it uses; Triton is not needed."""

from __future__ import annotations

import pytest

from .interpreter_runner import interpreted

CASES = (
    "long_lists_go_round_the_ring",
    "random_lists_and_short_tails",
    "whole_blocks_and_wide_query_blocks",
    "padded_head_dims_and_fused_views",
    "no_keys_at_all",
    "mistakes_in_the_protocol_are_found",
    "loads_nobody_waits_for_are_found",
)


@pytest.fixture(scope="module")
def emulated() -> dict[str, str]:
    """Results of gluon_cases.py."""
    return interpreted("gluon_cases")


@pytest.mark.parametrize("case", CASES)
def test_emulated_kernel(case: str, emulated: dict[str, str]) -> None:
    assert emulated[case] == "ok", emulated[case]


def test_every_case_is_looked_at(emulated: dict[str, str]) -> None:
    assert set(emulated) == set(CASES)
