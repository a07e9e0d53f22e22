"""What the pages on caches say is what there is: names of presets, settings in examples, reasons, links."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from dit_accel.caching.presets import PRESETS, preset_by_name, settings_of
from dit_accel.caching.record import FORCED

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
GUIDE = DOCS / "caching.md"
PAGES = [GUIDE, *sorted((DOCS / "caching").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def rows_of(text: str, head: str) -> list[list[str]]:
    """The cells of a table, by how its first line begins."""
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def examples() -> list[tuple[str, str]]:
    """Every Python example, with its page."""
    return [
        (page.name, code)
        for page in [*PAGES, REPOSITORY / "README.md"]
        for language, code in FENCE.findall(page.read_text(encoding="utf-8"))
        if language == "python"
    ]


def test_the_guide_lists_every_preset_once_and_its_page_explains_it() -> None:
    rows = rows_of(GUIDE.read_text(encoding="utf-8"), "| preset | skips |")
    found = [re.fullmatch(r"\[`(\w+)`\]\((caching/\w+\.md)\)", row[0]) for row in rows]
    assert all(found), "the first cell is [`name`](caching/page.md)"
    pages = {match[1]: match[2] for match in found if match is not None}
    assert sorted(pages) == sorted(PRESETS) and len(rows) == len(PRESETS)
    for name, page in pages.items():
        assert f"`{name}`" in (DOCS / page).read_text(encoding="utf-8"), f"{page} says nothing of {name}"


def test_the_readme_counts_the_presets() -> None:
    assert f"{len(PRESETS)} presets" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_guide_names_every_reason() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert [reason for reason in sorted(FORCED) if f"`{reason}`" not in text] == []


@pytest.mark.parametrize("page, code", examples())
def test_examples_name_presets_and_settings_that_exist(page: str, code: str) -> None:
    for call in ast.walk(ast.parse(code)):
        if not isinstance(call, ast.Call):
            continue
        given = {word.arg: word.value for word in call.keywords}
        cache, settings = given.get("cache"), given.get("cache_settings")
        if not isinstance(cache, ast.Constant):
            continue
        name = str(cache.value)
        assert name in PRESETS, f"{page}: {name}"
        keys = settings.keys if isinstance(settings, ast.Dict) else []
        used = {key.value for key in keys if isinstance(key, ast.Constant)}
        assert used <= {*settings_of(PRESETS[name])}, f"{page}: {name} has no setting in {used}"


@pytest.mark.parametrize("page, code", examples())
def test_examples_import_what_there_is(page: str, code: str) -> None:
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in imports:
        exec(compile(ast.Module([node], []), page, "exec"), {})


def test_commands_name_presets_that_exist() -> None:
    pages = [*PAGES, REPOSITORY / "README.md"]
    found = [(page.name, re.findall(r"--cache ([a-z_]+)", page.read_text(encoding="utf-8"))) for page in pages]
    assert any(names for _, names in found)
    for page, names in found:
        assert set(names) <= set(PRESETS), f"{page}: {names}"


def test_links_lead_somewhere() -> None:
    pages = [*PAGES, REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    for page in pages:
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("name", ["taylorseer-lite", "delta-dit"])
def test_hyphens_count_as_underscores(name: str) -> None:
    assert preset_by_name(name) == preset_by_name(name.replace("-", "_"))
