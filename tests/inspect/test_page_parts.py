"""Colors, charts, tables and words of the page, one by one."""

from __future__ import annotations

import math
import re

import pytest
import torch

from dit_accel.inspect.page.charts import Axis, Line, chart, logarithmic_axis, whole_axis
from dit_accel.inspect.page.colors import METHODS, ink, luminance, method_colors, method_letters, ramp
from dit_accel.inspect.page.curves import fit_in_words
from dit_accel.inspect.page.layout import Section, breakable
from dit_accel.inspect.page.sections import uniform_share
from dit_accel.inspect.page.style import STYLE
from dit_accel.inspect.page.tables import bar, cell_table, ramp_cell
from dit_accel.inspect.statistics import call_statistics
from dit_accel.processors import ATTENTION

from .oracle import video
from .page_reader import Reader


def contrast(one, other):
    """As WCAG 2 has it."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def parsed(color):
    """Red, green and blue of a color as CSS writes it."""
    return tuple(int(color[at : at + 2], 16) for at in (1, 3, 5))


def test_letters_can_be_read_on_every_color():
    for color in METHODS:
        assert contrast(parsed(color), (255, 255, 255)) >= 4.5, color
    for step in range(101):
        color = ramp(step / 100)
        assert contrast(color, parsed(ink(color))) >= 4.5
    rising = [luminance(ramp(step / 100)) for step in range(101)]
    assert rising == sorted(rising), "darker is less, also without colors"


def test_every_method_has_a_mark_of_its_own():
    names = [*ATTENTION, "radical", "block_rotation", "ra"]
    assert len(set(method_letters(names).values())) == len(names)
    assert len(set(method_colors(names[:10]).values())) == 10


def test_charts_put_points_where_they_belong():
    x, y = Axis(0, 10, [0, 5, 10], "x & y"), Axis(1, 16, [1, 4, 16], "up", logarithmic=True)
    drawn = chart("a <title>", [Line([(0, 1), (5, 4), (10, 16)], "one", "l"), Line([(5, 4)], "dots")], x, y, 120, 102)
    Reader(drawn)
    assert 'd="M52.0 62.0L74.0 36.0L96.0 10.0"' in drawn and '<circle cx="74.0" cy="36.0"' in drawn
    assert "a &lt;title&gt;" in drawn and "x &amp; y" in drawn
    axis = logarithmic_axis([0, 0.3, 5], "")
    assert axis.low == 0.25 and axis.high == 8 and axis.ticks[0] == 0.25
    assert [axis.text(value) for value in (1 / 64, 0.5, 1, 16)] == ["1/64", "1/2", "1", "16"]
    for low in range(-10, 1):
        assert 1 in logarithmic_axis([2.0**low, 40], "").ticks, "what uniform attention would be is marked"
    assert whole_axis(20, "").ticks[:2] == [0, 4] and whole_axis(0, "").high == 1


def test_words_can_be_read_on_what_they_stand_on_in_light_and_dark():
    light, dark = re.findall(":root {(.*?)}", STYLE, re.DOTALL)
    for block in (light, dark):
        colors = {name: parsed(color) for name, color in re.findall("--([a-z]+): (#[0-9a-f]{6})", block)}
        for ground in ("paper", "card"):
            for words in ("ink", "soft", "accent", "line"):
                assert contrast(colors[words], colors[ground]) >= 4.5, (words, ground)
        assert contrast(colors["ink"], colors["bar"]) >= 4.5
        assert contrast(colors["soft"], colors["bar"]) >= 4.5, "of methods that are not ranked"


def test_dark_colors_stay_on_the_screen_and_colored_cells_are_printed():
    assert "@media screen and (prefers-color-scheme: dark)" in STYLE
    assert "print-color-adjust: exact" in STYLE[STYLE.index("@media print") :]


@pytest.mark.parametrize("text", [0, 16])
def test_uniform_shares_are_those_of_uniform_attention(text):
    layout = video((5, 4, 3), after=text)
    nothing = torch.zeros(1, 1, layout.length, 8)
    found = call_statistics(nothing, nothing, layout)
    layer = {"grid": [5, 4, 3], "tokens": 60, "text_tokens": text}
    names = ["first_frame", "same_frame", "same_position", *(["text"] if text else [])]
    for name in names:
        assert uniform_share(layer, name) == pytest.approx(found[name].item(), rel=1e-5), name
    assert ("text" in found) == bool(text)


def test_fits_are_said_in_words():
    assert fit_in_words({"rate": None, "r_squared": None}, "frames") == "no exponential fits"
    assert fit_in_words({"rate": 0.3, "r_squared": 0.49}, "frames") == "not exponential, R² 0.49"
    assert fit_in_words({"rate": math.log(2) / 4, "r_squared": 0.9}, "frames") == "halves in 4 frames, R² 0.90"
    assert fit_in_words({"rate": -0.25, "r_squared": 0.9}, "tokens") == "rises, rate -0.25, R² 0.90"


def test_long_names_may_break_and_stay_text():
    assert breakable("a.<b>_c.0") == "a.&lt;b&gt;_<wbr>c.<wbr>0"
    assert Section("Recall & <density>", "").html().startswith('<section id="recall-density"><h2>Recall &amp; &lt;')


def test_bars_are_as_long_as_their_number():
    assert "--part:25.0%" in bar(0.25, "x") and "--part:100.0%" in bar(1.5, "x") and "&lt;" in bar(0, "<")


def test_cells_take_their_color_from_the_largest_value():
    assert ramp_cell(0.2, "", most=0.2).color == ramp_cell(1.0, "").color != ramp_cell(0.2, "").color
    assert ramp_cell(0.204, "").text == "20" and ramp_cell(0.204, "", "(20)").text == "(20)"


def test_wide_tables_have_narrow_cells():
    for width, is_narrow in ((12, False), (13, True)):
        table = Reader(cell_table("a <caption>", [("r", [ramp_cell(0.5, "t")] * width), ("s", [None])]))
        assert ("many" in table.all("table")[0]["class"]) is is_narrow and "a <caption>" in table.text
