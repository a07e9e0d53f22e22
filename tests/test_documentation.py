"""What the pages and examples show can be typed, loaded and followed."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

import dit_accel
from dit_accel.cli.parser import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Every command line in a block of code, with its page; ``...`` stands for a prompt."""
    return [
        (page.name, line)
        for page in PAGES
        for code in FENCE.findall(page.read_text(encoding="utf-8"))
        for line in code.replace("\\\n", " ").splitlines()
        if line.startswith("dit-accel ")
    ]


def test_pages_show_commands_and_there_are_examples() -> None:
    assert len(commands()) >= 15 and EXAMPLES


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_are_understood(page: str, line: str) -> None:
    options = build_parser().parse_args(shlex.split(line, comments=True)[1:])
    assert callable(options.command), page


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_can_be_loaded(example: Path) -> None:
    """What they import is there, and what they make before they run."""
    assert callable(runpy.run_path(str(example), run_name="example")["main"])


def anchors_of(page: Path) -> set[str]:
    """What links to its headings are called, by GitHub's rule."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_links_to_headings_lead_somewhere() -> None:
    found = [
        (page, link, anchor)
        for page in PAGES
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    ]
    assert found
    for page, link, anchor in found:
        target = page.parent / link if link else page
        assert anchor in anchors_of(target), f"{page.name} links to {link}#{anchor}"


def snippets(page: str) -> list[str]:
    """The Python blocks of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [code for code in FENCE.findall(text) if "import" in code]


def test_the_page_on_controls_runs(tiny_wan: object, capsys: pytest.CaptureFixture[str]) -> None:
    """With a small pipeline, and nothing is left behind."""
    attention, blocks = snippets("controls.md")
    for code in (attention, blocks):
        names: dict[str, Any] = {"pipe": tiny_wan}
        exec(code.replace("steps=10", "steps=10, height=32, width=32, num_frames=9, output_type='latent'"), names)
        assert dit_accel.acceleration_of(tiny_wan) is None
        if code is attention:
            seen = names["largest"].found
            assert len(seen) == 10 * 2 * 2 and all(value > 0 for value in seen.values())
    assert "('transformer', " in capsys.readouterr().out


def test_the_page_on_kernels_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    (code,) = snippets("kernels.md")
    exec(code, names)
    assert names["out"].shape == (1, 4, 1000, 64) and names["lse"].isfinite().all()
    first, second = capsys.readouterr().out.splitlines()
    assert float(first.split()[0]) < 0.3 and "gather" in first and 0.2 < float(second) < 0.3
