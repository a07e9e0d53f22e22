"""A journal of what many contenders did on many prompts, so that a long comparison goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...journal import Journal
from .records import Record

DENSE = "dense"


class Results:
    """A journal of what was found for whom, each under a kind, a contender and a prompt; the latest counts.

    Args:
        file: of the journal.
        context: everything that all results depend on.

    Raises:
        ValueError: if the file holds results of another context.
    """

    def __init__(self, file: Path, context: Record) -> None:
        self._journal = Journal(file, context)
        self._latest: dict[tuple[str, str, int | None], Record] = {}
        for _, record in sorted(self._journal.records.items()):
            self._take(record)

    def add(self, kind: str, name: str, content: Record, prompt: int | None = None) -> None:
        """Stores a result, on disk before returning."""
        record = plain({"kind": kind, "name": name, "prompt": prompt, **content})
        self._journal.add(len(self._journal.records), record)
        self._take(record)

    def get(self, kind: str, name: str, prompt: int | None = None, **expected: Any) -> Record | None:
        """A result, if there is one with these entries."""
        record = self._latest.get((kind, name, prompt))
        same = record and all(record.get(key) == plain(value) for key, value in expected.items())
        return record if same else None

    def forget(self, name: str) -> None:
        """Drops all that is known about a contender, for good."""
        self.add("forgotten", name, {})

    def _take(self, record: Record) -> None:
        if record["kind"] == "forgotten":
            self._latest = {key: each for key, each in self._latest.items() if key[1] != record["name"]}
        else:
            self._latest[record["kind"], record["name"], record["prompt"]] = record


def plain(content: Any) -> Any:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(content))
