"""The schedule as a picture: every cell at its place, SVG that is XML, PNG that shows the same."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from dit_accel.caching.picture import MOST_ROWS, schedule, schedule_png, schedule_svg
from dit_accel.caching.picture.png import DARK, LIGHT
from dit_accel.caching.picture.shapes import Box, Curve, Words, short
from dit_accel.caching.record import CacheRecord, Decision
from dit_accel.caching.report import CacheReport, cache_report
from dit_accel.report import Report

WAYS = [(True, "first"), (False, "policy"), (True, "policy"), (True, "audit")]


def report_of(
    ways: list[tuple[bool, str]] = WAYS, values: list[float | None] | None = None, name: str = "<mine> & yours"
) -> CacheReport:
    record = CacheRecord(name)
    for step, (computed, reason) in enumerate(ways):
        value = values[step] if values else None
        record.append(
            Decision(0, step, "cond", "transformer", "", None, computed, reason, value, 0.2 if values else None)
        )
    return cache_report(record, None, {("transformer", "cond", 2): 0.25})


def cells(report: CacheReport) -> list[Box]:
    return [shape for shape in schedule([report]).shapes if isinstance(shape, Box) and shape.title]


def elements(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return root.findall(f".//{{*}}{name}")


def test_every_step_has_its_cell() -> None:
    found = cells(report_of())
    assert [box.kind for box in found] == ["forced", "reused", "computed", "audited"]
    lefts = [box.left for box in found]
    assert len({b - a for a, b in pairwise(lefts)}) == 1 and lefts == sorted(lefts)
    assert found[2].shade < found[3].shade == 1.0
    assert found[2].title == "step 2, cond: computed (policy), attention kept 25.0%"


def test_sparser_attention_is_fainter() -> None:
    shades = []
    for density in (1.0, 0.5, 0.1, 0.0):
        record = CacheRecord()
        record.append(Decision(0, 0, "cond", "transformer", "", None, True, "policy"))
        (box,) = cells(cache_report(record, None, {("transformer", "cond", 0): density}))
        shades.append(box.shade)
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == 4 and shades[-1] > 0.2


def test_the_curve_has_a_point_for_every_value_and_its_threshold_lies_between() -> None:
    shapes = schedule([report_of(values=[None, 0.1, 0.4, float("nan")])]).shapes
    curves = {shape.kind: shape for shape in shapes if isinstance(shape, Curve)}
    (low_x, low), (high_x, high) = curves["value"].points
    boxes = cells(report_of())
    assert boxes[1].left < low_x < boxes[2].left < high_x < boxes[3].left
    threshold, base = curves["threshold"].points[0][1], curves["base"].points[0][1]
    assert high < threshold < low < base
    assert (base - threshold) / (base - high) == pytest.approx(0.5)
    assert (base - low) / (base - high) == pytest.approx(0.25)


@pytest.mark.parametrize("values", [[0.0] * 4, [-1.0, -2.0, 0.0, 1.0], [-1.0] * 4, [None, float("inf"), 1.0, 2.0]])
def test_any_values_can_be_drawn(values: list[float | None]) -> None:
    root = ElementTree.fromstring(schedule_svg([report_of(values=values)]))
    numbers = re.findall(r"[-\d.]+", " ".join(node.get("d", "") for node in elements(root, "path")))
    assert len(numbers) > 8 and all(0 <= float(number) <= 2000 for number in numbers)


def test_svg_is_xml_with_all_cells_and_says_what_it_is() -> None:
    text = schedule_svg([report_of()])
    root = ElementTree.fromstring(text)
    titles = [title.text for title in elements(root, "title")]
    assert sum(title is not None and title.startswith("step ") for title in titles) == 4
    assert "<mine> & yours: 3 of 4 cells computed" in (root.get("aria-label") or "")
    assert "prefers-color-scheme: dark" in text
    assert any(node.text == "cache <mine> & yours" for node in elements(root, "text"))


def test_everything_lies_within_the_picture() -> None:
    for steps in (1, 50, 400):
        drawing = schedule([report_of([(True, "policy")] * steps, values=[0.1] * steps)])
        boxes = [shape for shape in drawing.shapes if isinstance(shape, Box)]
        assert min(box.left for box in boxes) >= 0
        assert max(box.left + box.width for box in boxes) <= drawing.width
        assert max(box.top + box.height for box in boxes) <= drawing.height
        labels = [shape for shape in drawing.shapes if isinstance(shape, Words) and shape.centered]
        assert all(b.left - a.left >= 20 for a, b in pairwise(labels))


def test_many_rows_are_cut_and_that_is_said() -> None:
    record = CacheRecord()
    for unit in range(MOST_ROWS + 5):
        for step in range(8):
            record.append(Decision(0, step, "cond", "transformer", "", f"u{unit}", bool(unit >> step & 1), "policy"))
    drawing = schedule([cache_report(record)])
    assert len([shape for shape in drawing.shapes if isinstance(shape, Box) and shape.title]) == MOST_ROWS * 8
    assert any(isinstance(shape, Words) and shape.text.startswith("and 5 more rows") for shape in drawing.shapes)


@pytest.mark.parametrize(("dark", "colors"), [(False, LIGHT), (True, DARK)])
def test_png_shows_the_same_cells(dark: bool, colors: dict[str, tuple[int, int, int]]) -> None:
    report, scale = report_of(values=[None, 0.1, 0.4, 0.1]), 2
    image = Image.open(io.BytesIO(schedule_png([report], dark=dark, scale=scale)))
    drawing = schedule([report])
    assert image.size == (round(drawing.width * scale), round(drawing.height * scale))
    forced, reused, sparse, audited = cells(report)

    def color(box: Box, down: float = 0.4) -> Any:
        return image.getpixel(
            (round((box.left + box.width / 2) * scale), round((box.top + box.height * down) * scale))
        )

    assert color(forced) == color(audited) == colors["line"]
    assert color(forced, 0.79) == colors["paper"]  # the bar that tells it from the others
    assert color(reused) == colors["paper"]
    assert color(sparse) not in (colors["line"], colors["paper"])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="cache="):
        schedule_svg([])
    with pytest.raises(ValueError, match="call the pipeline first"):
        schedule_svg([cache_report(CacheRecord())])
    with pytest.raises(ValueError, match="from 1"):
        schedule_png([report_of()], scale=0)


def test_long_labels_are_cut_in_the_middle() -> None:
    assert short("abc", 1000) == "abc"
    cut = short("transformer_2, uncond: blocks 3-27", 120)
    assert len(cut) < 20 and cut.startswith("transf") and cut.endswith("3-27") and "…" in cut


def test_the_report_draws_its_caches() -> None:
    report = Report(None, None, "", None, 4, caches=[report_of(name="one"), report_of(name="two")])
    text = report.picture()
    assert "cache one" in text and "cache two" in text
    assert (
        "cache: one" in report.summary() and "transformer, cond: of 4 steps 3 computed, 1 reused" in report.summary()
    )
    assert [cache["name"] for cache in report.to_dict()["caches"]] == ["one", "two"]
