"""Lists of steps: masks, intervals, shrinking intervals and cache-dit's step computation masks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.caching.policies import SCM_MASKS, Interval, Policy, ScmMask, Shrinking, Sight, Static, scm_mask
from dit_accel.caching.unit import Unit

UNIT = Unit("blocks 0-3", "blocks", 0, 3)


def computed(policy: Policy, steps: int | None, count: int) -> list[int]:
    """Indices among the first ``count`` steps at which a judge wants to compute."""
    judge = policy.judge(UNIT, steps)
    sights = [
        Sight(step, steps, "cond", "transformer", UNIT, None, None, torch.zeros(1), None, None)
        for step in range(count)
    ]
    return [sight.step for sight in sights if judge.wants_compute(sight)]


def test_static_computes_what_it_lists() -> None:
    assert computed(Static(mask=(1, 0, 0, 1, 0)), 5, 5) == [0, 3]
    assert computed(Static(compute_steps=(3, 0, 3)), None, 5) == [0, 3]
    assert computed(Static(compute_steps=(0, 3), steps=5), 5, 5) == [0, 3]


@pytest.mark.parametrize("steps", [4, 6, None])
@pytest.mark.parametrize("policy", [Static(mask=(1, 0, 0, 1, 0)), Static(compute_steps=(0, 3), steps=5)])
def test_a_list_for_another_number_of_steps_is_refused(policy: Static, steps: int | None) -> None:
    with pytest.raises(ValueError, match="made for 5 steps"):
        policy.judge(UNIT, steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either"),
        ({"compute_steps": (0,), "mask": (1,)}, "either"),
        ({"mask": ()}, "one entry for each step"),
        ({"mask": (1, 2)}, "one entry for each step"),
        ({"mask": (1, 0), "steps": 3}, "leave steps out"),
        ({"compute_steps": (0, 5), "steps": 5}, "from 0 to 4"),
        ({"compute_steps": (-1,)}, "from 0"),
    ],
)
def test_bad_lists_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Static(**arguments)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(every=st.integers(1, 9), start=st.integers(0, 9))
def test_intervals_count_from_their_start(every: int, start: int) -> None:
    expected, following = [], start
    for step in range(40):
        if step < start:
            expected.append(step)
        elif step == following:
            expected.append(step)
            following += every
    assert computed(Interval(every, start), 40, 40) == expected


def test_intervals_refuse_no_distance() -> None:
    with pytest.raises(ValueError, match="every is a whole number from 1"):
        Interval(0)


def test_shrinking_gives_the_list_of_profilingdit() -> None:
    refreshed = [6, 18, 26, 32, 38, 42, 46, 48]
    assert list(Shrinking(12, 2, 6).refresh_steps(50)) == refreshed
    assert computed(Shrinking(12, 2, 6), 50, 50) == [0, 1, 2, 3, 4, 5, *refreshed]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    t_min=st.integers(1, 5),
    more=st.integers(0, 12),
    start=st.integers(0, 9),
    steps=st.integers(1, 80),
    multiple=st.integers(1, 3),
)
def test_shrinking_follows_its_formula(t_min: int, more: int, start: int, steps: int, multiple: int) -> None:
    policy = Shrinking(t_min + more, t_min, start, multiple)
    refreshed = policy.refresh_steps(steps)
    assert list(refreshed[:1]) == [start][: steps > start]
    gaps = [later - earlier for earlier, later in pairwise(refreshed)]
    assert gaps == sorted(gaps, reverse=True)
    for step, gap in zip(refreshed, gaps, strict=False):
        exact = t_min + more - more * (step - start) / (steps - start)
        assert gap == t_min or (gap % multiple == 0 and -0.5 - 1e-9 <= exact - gap < multiple - 0.5 + 1e-9)


def test_shrinking_needs_the_number_of_steps() -> None:
    with pytest.raises(ValueError, match="set_step"):
        Shrinking().judge(UNIT, None)


# cache-dit 1.5 itself made these (``cache_dit.steps_mask``), 1 computes.
PUBLISHED = {
    ("slow", 4): "1101",
    ("ultra", 6): "111001",
    ("medium", 8): "11110101",
    ("fast", 9): "111101001",
    ("slow", 12): "111101101111",
    ("ultra", 12): "110100100011",
    ("slow", 20): "11111111011100111001",
    ("ultra", 20): "11110000000000000001",
    ("slow", 28): "1111111101110011100110010001",
    ("medium", 28): "1111110110001100011000110001",
    ("fast", 28): "1111110100010000100000100001",
    ("ultra", 28): "1111001000001000000100000001",
    ("medium", 30): "111111111011000110001100011001",
    ("slow", 50): "11111111111111111111110011111000111110001110001101",
    ("medium", 50): "11111111111111110011100000111000001110000011100001",
    ("fast", 50): "11111111111001100000110000000110000000001100000001",
    ("ultra", 50): "11111110001100000000011000000000001100000000000001",
}


@pytest.mark.parametrize(("name", "steps"), PUBLISHED)
def test_step_masks_are_those_of_cache_dit(name: str, steps: int) -> None:
    mask = scm_mask(name, steps)
    assert "".join("01"[computes] for computes in mask) == PUBLISHED[name, steps]
    assert computed(ScmMask(name), steps, steps) == [step for step in range(steps) if mask[step]]


def test_28_steps_have_the_published_counts() -> None:
    """18, 15, 11 and 8 computed steps, and the last one, where the lists end with a reused one."""
    assert [sum(scm_mask(name, 28)) for name in SCM_MASKS] == [18, 15, 11, 8]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(name=st.sampled_from(SCM_MASKS), steps=st.integers(8, 300))
def test_step_masks_fit_any_number_of_steps(name: str, steps: int) -> None:
    mask = scm_mask(name, steps)
    assert len(mask) == steps
    assert mask[0] and mask[-1] and not all(mask)


@pytest.mark.parametrize(
    ("name", "steps", "message"), [("slow", 7, "4, 6"), ("slow", 1, "4, 6"), ("turbo", 28, "slow")]
)
def test_masks_that_are_not_there_are_refused(name: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scm_mask(name, steps)


def test_masks_need_the_number_of_steps() -> None:
    with pytest.raises(ValueError, match="set_step"):
        ScmMask("slow").judge(UNIT, None)


def test_a_static_judge_has_no_threshold_to_tighten() -> None:
    with pytest.raises(NotImplementedError, match="no threshold"):
        Interval(2).judge(UNIT, 4).tighten(0.5)
