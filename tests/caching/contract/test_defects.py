"""Every check fails on the defect that it was written from: in the cache of others itself, or planted into ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from dit_accel.caching.limits import Limits
from dit_accel.caching.presets.modules import fora
from dit_accel.caching.recipe import Cache

from . import checks, defects, peers
from .checks import Apply, Broken, ours
from .defects import Defect
from .peers import Config, diffusers_cache
from .recipes import OUTPUT, PROBE, computing_all, probing
from .subjects import Case, built, clean

Check = Callable[[Case, Apply], None]
ENDLESS = replace(PROBE, limits=Limits())  # computes where nothing was kept, and never again
ENDLESS_OUTPUT = replace(OUTPUT, limits=Limits())
CAUGHT = (AssertionError, RuntimeError, ValueError)  # where values of another size are mixed, torch says so

PLANTED: list[tuple[Check, Cache, Defect]] = [
    (checks.check_all_computed, computing_all(PROBE), defects.warmup_is_skipped),
    (checks.check_acts, PROBE, defects.hooks_are_not_reached),
    (checks.check_removal, PROBE, defects.hooks_stay),
    (checks.check_isolation, PROBE, defects.one_state_for_all_branches),
    (checks.check_isolation, fora(interval=3), defects.one_state_for_all_branches),
    (checks.check_one_branch, PROBE, defects.branch_by_parity),
    (checks.check_switch, PROBE, defects.branch_by_parity),
    (checks.check_guidance, ENDLESS, defects.nothing_is_reset),
    (checks.check_generations, ENDLESS, defects.nothing_is_reset),
    (checks.check_generations, ENDLESS_OUTPUT, defects.nothing_is_reset),
    (checks.check_sizes, ENDLESS, defects.nothing_is_reset),
    (checks.check_steps, ENDLESS, defects.nothing_is_reset),
    (checks.check_failure_between, ENDLESS, defects.nothing_is_reset),
    (checks.check_failure_within, ENDLESS, defects.nothing_is_reset),
]
PEERS: list[tuple[str, Check, Config]] = [
    ("wan", checks.check_isolation, peers.pyramid),
    ("flux", checks.check_isolation, peers.pyramid),
    ("wan", checks.check_failure_between, peers.first_block(1e9)),
    ("wan", checks.check_failure_within, peers.first_block(1e9)),
    ("flux", checks.check_failure_within, peers.first_block(1e9)),
    ("wan", checks.check_failure_between, peers.magnitude),
    ("wan", checks.check_failure_within, peers.taylor(cache_interval=2, use_lite_mode=True)),
    ("wan", checks.check_acts, peers.taylor(cache_interval=2)),
]


def id_of(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("check", "cache", "defect"), PLANTED, ids=id_of)
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_planted_defect_is_caught(
    name: str, check: Check, cache: Cache, defect: Defect, monkeypatch: pytest.MonkeyPatch
) -> None:
    if check is checks.check_switch and name != "wan":
        name = "wan-two-experts"  # the other pipeline decides on guidance once and for all
    caught: tuple[type[Exception], ...] = CAUGHT if check is checks.check_sizes else (AssertionError,)
    with clean(built(name)) as case:
        check(case, ours(cache))
        with monkeypatch.context() as patch, pytest.raises(caught):
            defect(patch)
            check(case, ours(cache))
    with clean(built(name)) as case:
        check(case, ours(cache))  # nothing of the defect is left


def test_a_branch_that_sees_the_other_is_not_as_if_it_alone_were_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    case = built("wan")
    defects.one_state_for_all_branches(monkeypatch)
    with clean(case), pytest.raises(AssertionError):
        checks.check_branch_alone(case, PROBE)


def test_a_threshold_that_nobody_can_choose_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    defects.values_are_not_told(monkeypatch)
    with clean(built("wan")) as case, pytest.raises(AssertionError):
        checks.check_values_told(case, probing)


def test_a_cache_that_knows_only_the_first_run_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers 0.40 kept its list of hooks when a cache was put on later; 0.42 drops it, unless it is told not to."""
    from diffusers.hooks import HookRegistry

    checks.check_late("wan", diffusers_cache(peers.first_block(1e9)))
    monkeypatch.setattr(HookRegistry, "invalidate_child_registries_cache", lambda self: None)
    with pytest.raises((AssertionError, ValueError), match="context"):
        checks.check_late("wan", diffusers_cache(peers.first_block(1e9)))


@pytest.mark.parametrize(("name", "check", "config"), PEERS, ids=id_of)
def test_a_defect_of_another_cache_is_caught_where_it_is(name: str, check: Check, config: Config) -> None:
    with clean(built(name)) as case, pytest.raises(AssertionError):
        check(case, diffusers_cache(config))


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_what_others_do_right_passes(name: str) -> None:
    """The checks ask nothing that only our caches could do."""
    apply = diffusers_cache(peers.first_block(1e9))
    with clean(built(name)) as case:
        for check in (checks.check_acts, checks.check_isolation, checks.check_generations, checks.check_sizes):
            check(case, apply)


def test_a_failing_generation_raises_what_it_raised_before() -> None:
    assert not issubclass(Broken, CAUGHT)
