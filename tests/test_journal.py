"""Results on disk: what was written is read again, half a line is dropped, and other settings are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_accel.journal import Journal


def test_a_journal_survives_an_interrupted_write(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.jsonl"
    journal = Journal(file, {"seed": 1})
    journal.add(0, {"value": 1})
    journal.add(2, {"value": 3})
    file.write_text(file.read_text() + '{"index": 3, "val')
    again = Journal(file, {"seed": 1})
    assert again.records == {0: {"value": 1}, 2: {"value": 3}}
    again.add(3, {"value": 4})
    assert Journal(file, {"seed": 1}).records[3] == {"value": 4}


@pytest.mark.parametrize("text", ["", "not json\n", "[1]\n", '{"index": 1}\n'])
def test_what_is_no_journal_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match="not a journal"):
        Journal(file, {})


def test_other_settings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    Journal(file, {"seed": 1, "steps": 9}).add(0, {"value": 1})
    with pytest.raises(ValueError, match=r"other settings \(seed was 1, is 2; steps was 9, is None\)"):
        Journal(file, {"seed": 2})
