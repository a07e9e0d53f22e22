"""Prediction bounds against tables and against drawn samples; targets and their scales."""

from __future__ import annotations

import math
import random

import pytest

from dit_accel.quality.margin import lower_bound, shared_coverage, student_quantile
from dit_accel.quality.target import MOST, Target, target_from


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [(0.95, 1, 6.3138), (0.95, 3, 2.3534), (0.975, 7, 2.3646), (0.99, 10, 2.7638), (0.5, 4, 0.0), (0.9, 120, 1.2886)],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: int, value: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(value, abs=2e-3)


@pytest.mark.parametrize(("prompts", "factor"), [(3, 4.5), (4, 3.3), (8, 2.4)])
def test_the_documented_factors_on_the_spread(prompts: int, factor: float) -> None:
    assert round(student_quantile(0.97, prompts - 1) * math.sqrt(1 + 1 / prompts), 1) == factor


@pytest.mark.parametrize(("prompts", "factor"), [(8, 4.1), (16, 3.3)])
def test_the_documented_factors_for_the_best_of_ten(prompts: int, factor: float) -> None:
    coverage = shared_coverage(0.97, 10)
    assert coverage is not None and coverage == pytest.approx(0.997)
    assert round(student_quantile(coverage, prompts - 1) * math.sqrt(1 + 1 / prompts), 1) == factor
    assert shared_coverage(0.97, 0) == shared_coverage(0.97, 1) == pytest.approx(0.97)
    assert shared_coverage(None, 7) is None


def test_the_luckiest_of_several_keeps_what_is_promised() -> None:
    """Eight caches that are alike, of which the one with the highest bound is taken."""
    rng = random.Random(0)
    held = {8: 0, 1: 0}
    for _ in range(1500):
        several = [[rng.gauss(30, 2) for _ in range(6)] for _ in range(8)]
        new = rng.gauss(30, 2)
        for caches in held:
            coverage = shared_coverage(0.95, caches)
            held[caches] += new >= max(lower_bound(scores, coverage) for scores in several)
    assert held[8] / 1500 >= 0.95 > 0.93 > held[1] / 1500


def test_the_documented_chance_that_15_of_16_keep_the_target() -> None:
    assert round(0.97**16 + 16 * 0.03 * 0.97**15, 2) == 0.92


def test_the_bound_holds_for_new_draws_as_often_as_it_says() -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(4000):
        scores = [rng.gauss(30, 2) for _ in range(6)]
        held += rng.gauss(30, 2) >= lower_bound(scores, 0.95)
    assert 0.945 <= held / 4000 <= 0.97  # the lowest score seen can only make it safer


def test_the_bound_is_never_above_the_lowest_score() -> None:
    assert lower_bound([30.0, 30.0, 30.0], 0.98) == 30.0
    assert lower_bound([20.0, 40.0, 40.0], 0.5) == 20.0
    assert lower_bound([31.0], None) == 31.0
    expected = 31 - 2.3534 * math.sqrt(20 / 3) * math.sqrt(1.25)  # 28, 30, 32, 34 about 31
    assert lower_bound([28.0, 30.0, 32.0, 34.0], 0.95) == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize(("scores", "coverage"), [([], None), ([30.0], 0.9), ([1.0, 2.0], 1.0), ([1.0, 2.0], 0.2)])
def test_bad_bounds_are_refused(scores: list[float], coverage: float | None) -> None:
    with pytest.raises(ValueError, match=r"prompt|coverage"):
        lower_bound(scores, coverage)


def test_scores_are_decibels_of_loss() -> None:
    assert Target("psnr", 28).score(math.inf) == MOST and Target("psnr", 28).wanted == 28
    assert Target("ssim", 0.9).wanted == pytest.approx(10)
    assert Target("ssim", 0.9).score(0.99) == pytest.approx(20) and Target("ssim", 0.9).score(1.0) == MOST
    assert Target("rel_error", 0.1).wanted == pytest.approx(20)
    assert Target("rel_error", 0.1).score(0.05) > 20 > Target("rel_error", 0.1).score(0.2)
    assert Target("psnr", 28).score(math.nan) == -math.inf
    assert "28 dB" in Target("psnr", 28.0).describe()


def test_exactly_one_target() -> None:
    assert target_from(target_psnr=28) == Target("psnr", 28)
    assert target_from(max_time=3.5) == Target("time", 3.5)
    for given in ({}, {"target_psnr": 28.0, "target_ssim": 0.9}):
        with pytest.raises(ValueError, match="exactly one target"):
            target_from(**given)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("psnr", 0), ("psnr", math.inf), ("ssim", 1.0), ("ssim", 0), ("rel_error", 1.5), ("time", -1), ("psnr", True)],
)
def test_targets_out_of_range_are_refused(kind: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"target_|max_"):
        Target(kind, value)


def test_prompts_that_reuse_nothing_do_not_lower_the_bound() -> None:
    reusing = [30.0, 31.0, 30.5]
    alone = lower_bound(reusing, 0.97)
    assert 25 < alone < 30
    assert lower_bound([MOST, *reusing, MOST, MOST], 0.97) == alone
    assert lower_bound([MOST, MOST], 0.97) == MOST
    assert lower_bound([MOST, 30.0, MOST], 0.97) < 30  # one alone has no spread: be careful
