"""Nothing is left of a generation that failed, between two steps or in the midst of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import checks
from .checks import Apply, ours
from .recipes import pairs, recipes_for
from .subjects import Case, built, clean

CHECKS = (checks.check_failure_between, checks.check_failure_within)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "cache"), pairs())
def test_after_a_failure_a_generation_equals_a_fresh_one(
    name: str, cache: str, check: Callable[[Case, Apply], None]
) -> None:
    with clean(built(name)) as case:
        check(case, ours(recipes_for(name)[cache]))
