"""The table of caches without renderings: who takes part, figures of a row, who is best, the picture, kept targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

from dit_accel.caching.presets import PRESETS as NAMES
from dit_accel.caching.presets import settings_of
from dit_accel.caching.presets.profiling import profiling
from dit_accel.shapes.caches.contender import PEERS, PRESETS, TOGETHER
from dit_accel.shapes.caches.contenders import PresetContender, contenders
from dit_accel.shapes.caches.figure import Plane, caches_figure, front
from dit_accel.shapes.caches.table import best
from dit_accel.shapes.caches.targets import verdicts
from dit_accel.shapes.report.cells import psnr_and_time


def test_every_preset_takes_part_with_settings_it_has() -> None:
    everyone = contenders()
    assert len({each.name for each in everyone}) == len(everyone)
    assert all(each.key == each.settings for each in everyone if each.group != TOGETHER)
    ours = [each for each in everyone if isinstance(each, PresetContender)]
    presets = NAMES | {"profiling": profiling}
    assert {each.preset for each in ours} == {*presets, ""}
    for each in ours:
        assert set(each.settings) <= {*(settings_of(presets[each.preset]) if each.preset else ())}, each.name
    with pytest.raises(ValueError, match=r"nobody is called 'easycash'; choose among static"):
        contenders(["easycash"])
    curve: Callable[[str], int] = lambda name: len(contenders([name]))  # noqa: E731
    assert curve("diffusers FirstBlockCache") == 6


def rows_of(*rows: tuple[str, str, float | str, float, int]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "group": group,
            "psnr_db": {"mean": db},
            "speedup": {"median": speed},
            "runs": runs,
            "computed_share": 1.0 if db == "bit-equal" else 0.5,
        }
        for name, group, db, speed, runs in rows
    ]


def test_the_best_is_the_fastest_that_is_good_enough() -> None:
    rows = rows_of(
        ("a", PRESETS, 28.5, 2.4, 4),
        ("b", PRESETS, 27.9, 3.0, 4),
        ("c", PRESETS, 31.0, 2.1, 4),
        ("d", PRESETS, 40.0, 9.0, 1),  # of one prompt only
        ("e", TOGETHER, 40.0, 9.0, 4),
        ("f", PEERS, 28.0, 2.0, 4),
        ("g", PEERS, 35.0, 1.5, 4),
        ("h", PEERS, "bit-equal", 9.0, 4),  # reused nothing
    )
    found = best(rows, 28.0)
    assert (found["ours"]["name"], found["others"]["name"], found["faster"]) == ("a", "f", 1.2)
    assert (found["ours_at_their_speed"]["name"], found["better_db"]) == ("c", 3.0)
    assert best(rows_of(("a", PRESETS, 30.0, 1.0, 1)), 28.0)["others"] is None
    assert best([], 28.0)["prompts"] == 0


def judged_run(psnr_db: float | str) -> dict[str, Any]:
    seconds = {"sampling_seconds": 1.0, "dense_sampling_seconds": 3.0}
    return {"psnr_db": psnr_db, "ssim": 1.0, "right": {"color": True}, "all": True, **seconds}


def test_prompts_that_come_out_equal_to_dense_do_not_hide_how_far_the_others_are() -> None:
    figures = psnr_and_time([judged_run(db) for db in ("bit-equal", 20.0)])
    assert figures["psnr_db"] == {"mean": 20.0, "min": 20.0, "bit_equal": 1}
    (row,) = rows_of(("a", PRESETS, 30.0, 2.0, 2))
    assert best([row], 28.0)["ours"] is not None
    assert best([row | figures], 28.0)["ours"] is None
    assert psnr_and_time([judged_run(db) for db in (20.0, 30.0)])["psnr_db"]["mean"] == 25.0
    whole = psnr_and_time([judged_run("bit-equal")] * 2)
    assert whole["psnr_db"] == {"mean": "bit-equal", "min": "bit-equal", "bit_equal": 2}


def test_the_picture_shows_who_is_not_beaten() -> None:
    rows = rows_of(
        ("slow", PRESETS, 40.0, 1.2, 4),
        ("beaten", PRESETS, 30.0, 1.5, 4),
        ("equal", PRESETS, 35.0, 1.6, 4),
        ("good & fast", PRESETS, 35.0, 2.0, 4),
        ("of one prompt", PRESETS, 60.0, 9.0, 1),
        ("same", PRESETS, "bit-equal", 1.0, 4),
        ("other", PEERS, 28.0, 1.4, 4),
    )
    assert [row["name"] for row in front(rows[:6])] == ["slow", "good & fast"]
    picture = caches_figure(rows)
    assert picture is not None
    texts = [each.text for each in ElementTree.fromstring(picture).iter() if each.tag.endswith("text")]
    assert {"slow", "good & fast", "other"} <= {*texts}
    assert not {"beaten", "equal", "of one prompt", "same"} & {*texts}
    assert caches_figure(rows[:1]) is None
    plane = Plane.around([(1.0, 20.0), (2.0, 40.0)])
    (left, low), (right, high) = plane.at((1.0, 20.0)), plane.at((2.0, 40.0))
    assert left < right and high < low  # upward is less from the top


def cache_of(speed: float) -> dict[str, Any]:
    """The same for speeds that are alike."""
    return {"steps": 20, "scope": "output", "predictor": "reuse", "computed": [*range(10 - round(speed))]}


def verdict_rows(*rows: tuple[float, float, list[float | str]]) -> list[dict[str, Any]]:
    return [
        {
            "settings": {"target_psnr": target, "cache": cache_of(speed), "reason": ""},
            "runs": len(values),
            "prompts": [
                {"psnr_db": value, "sampling_seconds": 2.0, "dense_sampling_seconds": 2.0 * speed} for value in values
            ],
            "psnr_db": {"min": 0, "mean": 0},
            "computed_share": 1.0,
            "motion_ratio": None,
        }
        for target, speed, values in rows
    ]


def test_a_target_is_met_prompt_by_prompt_and_speed_has_to_fall() -> None:
    rows = verdict_rows((28.0, 1.4, [28.0, 27.99, "bit-equal"]), (22.0, 2.0, [30.0, 21.0, 25.0]))
    found = verdicts(rows)
    assert [(each["target_psnr"], each["met"], each["of"]) for each in found["targets"]] == [(22, 2, 3), (28, 2, 3)]
    assert found["speed_falls_with_target"] is True
    assert verdicts(verdict_rows((22.0, 1.5, [30.0]), (28.0, 2.6, [30.0])))["speed_falls_with_target"] is False
    assert verdicts(rows[:1])["speed_falls_with_target"] is None


def test_the_same_cache_has_one_speed_whatever_the_target() -> None:
    found = verdicts(verdict_rows((22.0, 2.8, [30.0, 31.0]), (25.0, 3.1, [30.0]), (28.0, 2.0, [30.0])))
    assert [each["speedup"] for each in found["targets"]] == [2.8, 2.8, 2.0]  # of 2.8, 2.8 and 3.1
    assert found["speed_falls_with_target"] is True
