"""What a cache does to the output of a pipeline: nothing where all is computed or it was removed, else something."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import checks, recipes
from .checks import Apply, ours
from .recipes import computing_all, pairs, recipes_for
from .subjects import Case, built, clean

Check = Callable[[Case, Apply], None]


def test_the_lists_of_cases_are_those_there_are() -> None:
    from .subjects import CASES

    assert set(recipes.CASES) == set(CASES)
    made = {name: built(name) for name in CASES}
    assert {name for name, case in made.items() if case.calls == "sequential"} == {*recipes.SEQUENTIAL}
    assert {name for name, case in made.items() if case.switchable} == {*recipes.SWITCHABLE}
    assert {name for name, case in made.items() if case.is_unet} == {*recipes.UNET_CASES}


@pytest.mark.parametrize(("name", "cache"), pairs())
def test_all_computed_is_bit_equal_to_stock(name: str, cache: str) -> None:
    with clean(built(name)) as case:
        checks.check_all_computed(case, ours(computing_all(recipes_for(name)[cache])))


@pytest.mark.parametrize(("name", "cache"), [pair for pair in pairs() if pair[1] in recipes.ZERO])
def test_a_threshold_of_zero_is_bit_equal_to_stock(name: str, cache: str) -> None:
    with clean(built(name)) as case:
        checks.check_all_computed(case, ours(recipes.ZERO[cache]))


@pytest.mark.parametrize("check", [checks.check_acts, checks.check_removal])
@pytest.mark.parametrize(("name", "cache"), pairs())
def test_it_acts_and_comes_off(name: str, cache: str, check: Check) -> None:
    with clean(built(name)) as case:
        check(case, ours(recipes_for(name)[cache]))


@pytest.mark.parametrize(("name", "cache"), pairs())
def test_a_cache_put_on_after_a_first_run_acts_as_one_put_on_at_once(name: str, cache: str) -> None:
    checks.check_late(name, ours(recipes_for(name)[cache]))


@pytest.mark.parametrize("name", [name for name in recipes.CASES if name not in recipes.UNET_CASES])
def test_what_a_threshold_is_compared_with_is_told(name: str) -> None:
    with clean(built(name)) as case:
        checks.check_values_told(case, recipes.probing)
