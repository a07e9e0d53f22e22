"""``dit-accel simulate``: exact densities of the authors' rule, as published by running their code."""

from __future__ import annotations

import json

import pytest

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
