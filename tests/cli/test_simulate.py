"""``dit-accel simulate``: exact densities of the authors' rule, as published by running their code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dit_accel.processors import ATTENTION

from .conftest import Command


@pytest.mark.parametrize(
    ("grid", "words", "density"),
    [
        ("9x16x16", [], 0.8765),
        ("33x16x16", [], 0.4582),
        ("9x16x16", ["--block", 64], 0.696),
        ("33x16x16", ["--block", 64], 0.330),
    ],
)
def test_density_is_that_of_the_authors_code(command: Command, grid: str, words: list[object], density: float) -> None:
    result = command("simulate", "--method", "radial", "--grid", grid, "--decay", 0.2, *words, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["density"] == pytest.approx(density, abs=5e-4)
    assert 0.5 < found["predicted_speedup"] * found["density"] < 1, "the kernel is assumed slower per pair than dense"
    assert found["assumptions"]


def test_every_option_counts(command: Command) -> None:
    def density(*words: object) -> float:
        out = command("simulate", "--grid", "17x16x16", "--block", 64, *words, "--json").out
        value: float = json.loads(out)["density"]
        return value

    plain = density()
    assert density("--decay", 4) > plain
    assert density("--no-sink") < plain
    assert density("--rule", "paper") != plain
    assert density("--mask", "element") < plain
    assert density("--text", 100) > plain


def test_table(command: Command) -> None:
    out = command("simulate", "--grid", "9X16x16").out
    assert "density" in out and "predicted speedup" in out and "0.876" in out


@pytest.mark.parametrize("grid", ["9x16", "0x16x16", "axbxc", "9x16x16x2"])
def test_bad_grid(command: Command, grid: str) -> None:
    result = command("simulate", "--grid", grid)
    assert result.code == 2
    assert "18x48x80" in result.err and result.err.count("\n") == 1


def test_method_must_be_known(command: Command) -> None:
    assert "radial" in command("simulate", "--method", "magic", "--grid", "9x16x16").err


def test_neighborhood_reports_its_bounds(command: Command) -> None:
    """Published for HunyuanVideo: 91 % sparse, every block whole, so tiles reach the bound by arithmetic."""
    words = ("--grid", "30x48x80", "--window", "18x24x24", "--stride", "16x8x8", "--tile", "2x8x8")
    result = command("simulate", "--method", "neighborhood", *words, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["window"], found["stride"], found["dilation"]) == ("18x24x24", "16x8x8", "1x1x1")
    assert found["density"] == found["computed_share"] == pytest.approx(0.09)
    assert found["flop_bound"] == pytest.approx(100 / 9)
    for tiling in ("static_tiling", "dynamic_tiling"):
        cost = found[tiling]
        assert (cost["total"], cost["most"], cost["block_sparse"]) == (900, 81, True)
        assert cost["speedup"] == cost["worst_speedup"] == pytest.approx(100 / 9)


def test_neighborhood_options_count(command: Command) -> None:
    def found(*words: object) -> Any:
        return json.loads(command("simulate", "--method", "neighborhood", "--grid", "9x16x16", *words, "--json").out)

    plain = found()
    assert (plain["window"], plain["causal"]) == ("6x10x10", "0x0x0")
    assert found("--window", 0.3)["density"] < plain["density"] < found("--text", 100)["density"]
    assert found("--snap")["density"] == pytest.approx(plain["computed_share"])
    assert found("--causal", "1x0x0")["density"] < plain["density"]
    assert found("--window", 0.3, "--dilation", "widest")["dilation"] == "3x3x3"
    assert found("--stride", "tile", "--tile", "1x8x8", "--block", 64)["stride"] == "1x8x8"


def test_neighborhood_table_and_refusal(command: Command) -> None:
    words = ("simulate", "--method", "neighborhood", "--grid", "9x16x16")
    assert "dynamic tiling speedup" in command(*words).out
    result = command(*words, "--window", "6x17x6")
    assert result.code == 2 and "window 17 is larger than the 16 rows of the grid; give 1 to 16" in result.err


@pytest.mark.parametrize("method", sorted(set(ATTENTION) - {"radial", "neighborhood", "vmoba"}))
def test_a_plan_that_is_found_while_running_is_not_predicted(command: Command, method: str) -> None:
    result = command("simulate", "--method", method, "--grid", "9x16x16")
    assert result.code == 2
    assert "only at run time" in result.err and f"render --attention {method}" in result.err


def test_vmoba_is_predicted_from_numbers_of_cells(command: Command) -> None:
    words = ("simulate", "--method", "vmoba", "--grid", "20x30x52", "--block", 64)
    found = json.loads(command(*words, "--top-k", "3,20,15", "--json").out)
    parts = [found[f"{part}_highest_density"] for part in ("temporal", "spatial", "cubes")]
    assert parts == pytest.approx([3 / 10, 20 / 130, 15 / 325])  # all cells are of one size
    assert found["lowest_density"] == found["highest_density"] == pytest.approx(sum(parts) / 3)
    assert found["cubes_cell"] == "4x6x4" and found["predicted_speedup"] == pytest.approx(0.85 * 3 / sum(parts))
    assert "--top-k 3,20,15" in command(*words).err
    assert "whole number of cells" in command(*words, "--top-k", "0.5").err


@pytest.mark.parametrize(
    ("words", "flag", "method", "owner"),
    [
        (["--window", 0.3], "--window", "radial", "neighborhood"),
        (["--snap"], "--snap", "radial", "neighborhood"),
        (["--top-k", 3], "--top-k", "radial", "vmoba"),
        (["--method", "neighborhood", "--decay", 0.2], "--decay", "neighborhood", "radial"),
        (["--method", "neighborhood", "--no-sink"], "--no-sink", "neighborhood", "radial"),
        (["--method", "neighborhood", "--top-k", 3], "--top-k", "neighborhood", "vmoba"),
        (["--method", "vmoba", "--top-k", 3, "--rule", "authors"], "--rule", "vmoba", "radial"),
        (["--method", "vmoba", "--top-k", 3, "--mask", "block"], "--mask", "vmoba", "radial"),
        (["--method", "vmoba", "--top-k", 3, "--tile", "1x8x8"], "--tile", "vmoba", "neighborhood"),
    ],
)
def test_options_of_other_methods_are_refused(
    command: Command, words: list[object], flag: str, method: str, owner: str
) -> None:
    result = command("simulate", "--grid", "9x16x16", *words)
    assert result.code == 2 and result.out == ""
    assert f"{flag} does nothing with --method {method}; leave it out, or choose {owner}" in result.err


def test_what_is_not_given_is_as_the_help_says(command: Command) -> None:
    said = " ".join(command("simulate", "--help").out.split())
    for words in ("radial: decay factor (default: 0.2)", "(default: authors)", "(default: block)", "(default: 0.6)"):
        assert words in said
    plain = command("simulate", "--grid", "9x16x16", "--json").out
    usual = ("--decay", 0.2, "--rule", "authors", "--mask", "block", "--block", 128, "--text", 0)
    assert command("simulate", "--grid", "9x16x16", *usual, "--json").out == plain
    assert json.loads(plain)["sink"] is True
