"""Branches of guidance never see each other's values, whether there are two, one, or first two and then one."""

from __future__ import annotations

import pytest

from . import checks
from .checks import ours
from .recipes import SEQUENTIAL, SWITCHABLE, pairs, recipes_for
from .subjects import built, clean


@pytest.mark.parametrize(("name", "cache"), pairs())
def test_a_branch_does_not_depend_on_the_prompt_of_the_other(name: str, cache: str) -> None:
    with clean(built(name)) as case:
        checks.check_isolation(case, ours(recipes_for(name)[cache]))


@pytest.mark.parametrize(("name", "cache"), pairs(SEQUENTIAL))
def test_a_branch_is_as_if_it_alone_were_cached(name: str, cache: str) -> None:
    with clean(built(name)) as case:
        checks.check_branch_alone(case, recipes_for(name)[cache])


@pytest.mark.parametrize(("name", "cache"), pairs())
def test_generations_with_and_without_guidance_equal_fresh_ones(name: str, cache: str) -> None:
    with clean(built(name)) as case:
        checks.check_guidance(case, ours(recipes_for(name)[cache]))


@pytest.mark.parametrize(("name", "cache"), pairs(SEQUENTIAL))
def test_without_guidance_the_branch_that_is_left_is_as_beside_the_other(name: str, cache: str) -> None:
    with clean(built(name)) as case:
        checks.check_one_branch(case, ours(recipes_for(name)[cache]))


@pytest.mark.parametrize(("name", "cache"), pairs(SWITCHABLE))
def test_guidance_may_end_within_a_generation(name: str, cache: str) -> None:
    with clean(built(name)) as case:
        checks.check_switch(case, ours(recipes_for(name)[cache]))
