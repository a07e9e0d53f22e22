"""The page is whole, readable by machines, and needs nothing from outside."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch

from dit_accel.inspect import InspectionRecorder
from dit_accel.inspect.methods import Candidate
from dit_accel.inspect.page import report_page
from dit_accel.inspect.page.best import ranked
from dit_accel.inspect.page.curves import decay_curves
from dit_accel.inspect.page.words import next_best, sentences, suggestion_code, suggestion_json
from dit_accel.inspect.report import build_report
from dit_accel.processors import processor_by_name

from .oracle import call_for, video
from .page_reader import Reader

PROMPT = '<script>alert("1")</script> & a "red" $circle'


@pytest.fixture(scope="module")
def inspected():
    """A report of two layers with three heads, with text, and its pictures."""
    torch.manual_seed(0)
    layout = video((10, 8, 8), after=16)
    candidates = [Candidate(name, 0.25) for name in ("radial", "block_routing", "compensated")]
    recorder = InspectionRecorder([3], candidates)
    for layer in range(2):
        query, key, value = (torch.randn(1, 3, layout.length, 8) for _ in range(3))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        recorder.record(call_for(layout, layer, 2, f"blocks.{layer}.attn1"), query, key, value, output)
    settings = {"model": "a/<model>", "pipeline": "SomePipeline", "prompt": PROMPT, "seed": 1, "steps": 10}
    report = build_report(
        recorder,
        settings=settings,
        environment={"torch": "1.2.3"},
        density=0.25,
        not_compared={"magic": "magic has <no> setting"},
        seconds=1.23,
    )
    return json.loads(json.dumps(report)), recorder.pictures()


def test_the_page_is_well_formed_and_self_contained(inspected):
    page = report_page(*inspected)
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>") and reader.all("html") == [{"lang": "en"}]
    assert not re.search(r"https?:|//[a-z]|@import|url[(]", re.sub(r"base64,[^\"]+", "", page))
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "link", "iframe", "object", "form"})
    assert all(source["src"].startswith("data:image/png;base64,") for source in reader.all("img"))
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)


def test_pictures_charts_and_tables_have_words(inspected):
    reader = Reader(report_page(*inspected))
    alts = [image["alt"] for image in reader.all("img")]
    assert "Attention, blocks.1.attn1, head 2" in alts and "What radial keeps, blocks.0.attn1, all heads" in alts
    assert "What block_routing keeps, blocks.1.attn1, head 0" in alts and len(set(alts)) == len(alts)
    assert len(alts) == 2 * (3 + 1 + 3 + 3)
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in reader.all("svg"))
    assert all("scope" in head for head in reader.all("th"))
    assert "prefers-color-scheme: dark" in reader.text


def test_what_users_and_models_write_is_text(inspected):
    page = report_page(*inspected)
    assert "<script" not in page and "<model>" not in page and "<no>" not in page
    reader = Reader(page)
    assert PROMPT in reader.text and "a/<model>" in reader.text and "magic has <no> setting" in reader.text


def test_numbers_of_the_report_are_in_the_page(inspected):
    report, pictures = inspected
    text = Reader(report_page(report, pictures)).text
    best = report["layers"][1]["best"][2]
    error = report["layers"][1]["methods"][best]["error"][2]
    assert best is not None and f"{error * 100:.0f}" in text
    assert all(sentence in text for sentence in sentences(report))
    assert "640 visual tokens and 16 others" in text and "text and other tokens that are not visual" in text
    assert suggestion_code(report) in text and suggestion_json(report) in text


def test_suggested_code_runs(inspected):
    report, _ = inspected
    given = {}

    class Package:
        @staticmethod
        def accelerate(pipe, **settings):
            given.update(settings)

    exec(suggestion_code(report), {"dit_accel": Package, "pipe": None})
    recipe = processor_by_name(given.pop("attention"), **given)
    again = json.loads(suggestion_json(report))
    assert processor_by_name(again.pop("attention"), **again).settings() == recipe.settings()


def test_a_report_without_methods_recall_and_decay_is_a_page(inspected):
    report, pictures = inspected
    bare = copy.deepcopy(report)
    nothing = {"method": None, "hard_layers": [], "error_by_layer": {}, "suggestion": None, "methods": {}}
    bare |= {"advice": nothing, "methods": {}, "not_compared": {}}
    for layer in bare["layers"]:
        flat = {"rate": None, "r_squared": None}
        layer |= {
            "methods": {},
            "best": [None] * 3,
            "frames": None,
            "space": {**layer["space"], **flat},
            "unlike": 0.5,
        }
        layer |= {"recall": {"64": None}, "shares": dict.fromkeys(layer["shares"])}
    text = Reader(report_page(bare, pictures)).text
    assert "No methods were compared" in text and "too few tokens to speak of blocks" in text
    assert "no exponential fits" in text and "Caution: in 2 layers" in text
    assert suggestion_code(bare) is None and suggestion_json(bare) is None


def test_hard_layers_are_named(inspected):
    report = copy.deepcopy(inspected[0])
    report["advice"] |= {"hard_layers": [1], "error_by_layer": {"0": 0.1, "1": 0.6}}
    assert "Layer 1 stays hard, with an error of 60%: keep it dense." in sentences(report)
    report["advice"] |= {"hard_layers": [0, 1]}
    assert "Layers 0, 1 stay hard, with an error of up to 60%: keep them dense." in sentences(report)


def test_what_makes_a_layer_hard_is_said_where_none_is(inspected):
    report = copy.deepcopy(inspected[0])
    report["advice"] |= {"hard_layers": [], "error_by_layer": {"0": 0.01, "1": 0.09}}
    (said,) = [sentence for sentence in sentences(report) if sentence.startswith("No layer stands out as hard")]
    assert "both twice the usual error and more than 10% of its output" in said


def test_sections_can_be_reached(inspected):
    reader = Reader(report_page(*inspected))
    anchors = [section["id"] for section in reader.all("section")]
    assert len(set(anchors)) == len(anchors) == 9
    assert [link["href"] for link in reader.all("a")] == [f"#{anchor}" for anchor in anchors]
    regions = [part for part in reader.all("div") if part.get("class") == "scroll"]
    assert regions and all(part["tabindex"] == "0" and part["aria-label"] for part in regions)


def test_every_row_of_a_table_is_as_wide_as_its_head(inspected):
    page = report_page(*inspected)
    tables = re.findall('<table class="(?:cells|maps|plain).*?</table>', page)
    assert len(tables) == 3 + 1 + 1 + 2  # of heads and layers, of methods, of shares, of maps
    for table in tables:
        open_rows, widths = {}, []
        for number, row in enumerate(re.findall("<tr>.*?</tr>", table)):
            cells = re.findall("<t[dh]([^>]*)>", row)
            spans = [
                [int(*re.findall(f'{way}span="(\\d+)"', cell) or [1]) for cell in cells] for way in ("col", "row")
            ]
            widths.append(sum(spans[0]) + open_rows.get(number, 0))
            for wide, tall in zip(*spans, strict=True):
                for later in range(number + 1, number + tall):
                    open_rows[later] = open_rows.get(later, 0) + wide
        assert len(set(widths)) == 1, table[:80]


def test_methods_that_are_not_sparse_enough_come_last(inspected):
    report = copy.deepcopy(inspected[0])
    methods = report["advice"]["methods"]
    for number, name in enumerate(methods):
        methods[name] |= {"error": 0.1 * (number + 1), "fair": number > 0}
    first, *others = methods
    assert ranked(report) == [*others, first]
    text = Reader(report_page(report, inspected[1])).text
    table = text[text.index("Over all heads") :]
    assert table.index(others[-1]) < table.index("Not ranked") < table.index(first)
    report["advice"]["method"] = others[0]
    assert next_best(report) == f"{others[1]} is next with 30.0%"


def test_decay_charts_share_axes_and_many_are_folded(inspected):
    report = copy.deepcopy(inspected[0])
    report["layers"] *= 10
    report["layers"] = [copy.deepcopy(layer) for layer in report["layers"]]
    report["layers"][-1]["frames"]["profile"][0] = 30.0
    page = decay_curves(report).html()
    frames, space = page.split("By distance in space")
    for part in (frames, space):
        grids = {tuple(re.findall('class="grid" d="([^"]+)"', drawing)) for drawing in part.split("<svg")[1:]}
        assert len(grids) == 1 and part.count("<svg") == 20 and "8 more layers" in part
        assert part.index("8 more layers") > part.index("<details>")
    assert ">16</text>" in frames and ">16</text>" not in space


def test_suggested_code_of_many_layers_has_short_lines(inspected):
    report = copy.deepcopy(inspected[0])
    budgets = {str(layer): [1.25] * 4 for layer in range(40)}
    schedule = {"layer_budget": {str(layer): 1.25 for layer in range(40)}, "head_budget": budgets}
    report["advice"]["suggestion"] = {"attention": "compensated", "schedule": schedule}
    code = suggestion_code(report)
    assert max(map(len, code.splitlines())) < 120
    given = eval(code, {"dit_accel": SimpleNamespace(accelerate=lambda pipe, **settings: settings), "pipe": None})
    assert json.loads(json.dumps(given)) == report["advice"]["suggestion"]
