"""Results kept line by line, so that what was interrupted goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .files import staged


class Journal:
    """A file of JSON lines: what the results depend on, then one result under each number.

    Results of other settings are never mixed in: opening such a file is an error.

    Args:
        file: made at the first result; its folder too.
        context: everything the results depend on, as JSON values.

    Raises:
        ValueError: if the file was written under another context, or is no journal.
    """

    def __init__(self, file: Path, context: dict[str, Any]) -> None:
        self.file, self.context = file, context
        self.records: dict[int, dict[str, Any]] = {}
        if file.exists():
            self._read()

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Stores a result, on disk before returning."""
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps({"context": self.context}) + "\n")
        with self.file.open("a") as lines:
            lines.write(json.dumps({"index": index, **record}, allow_nan=False) + "\n")
        self.records[index] = record

    def _read(self) -> None:
        text = self.file.read_text()
        whole = text[: text.rfind("\n") + 1]  # an interrupted write leaves half a line at the end
        try:
            header, *records = [json.loads(line) for line in whole.splitlines()] or [{}]
            context = header["context"]
            self.records = {record.pop("index"): record for record in records}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file} is not a journal of results; delete it or write to another file") from error
        self._check(context)
        if whole != text:
            with staged(self.file) as (scratch,):
                scratch.write_text(whole)

    def _check(self, stored: dict[str, Any]) -> None:
        names = sorted(name for name in {*stored, *self.context} if stored.get(name) != self.context.get(name))
        if names:
            changes = "; ".join(f"{name} was {stored.get(name)!r}, is {self.context.get(name)!r}" for name in names)
            raise ValueError(
                f"{self.file} holds results of other settings ({changes}); write to another file, or delete it to "
                "start again"
            )
