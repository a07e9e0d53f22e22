"""What the pages and examples show can be typed, loaded and followed."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

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
