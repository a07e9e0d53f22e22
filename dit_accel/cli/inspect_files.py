"""The files of one inspection: a folder with the report for people and for machines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dit_accel.files import check_writable, staged

from .errors import EnvironmentProblem, UsageError, one_line

FILES = ("report.json", "report.html")


def check_folder(folder: Path, force: bool) -> None:
    """Makes sure now that the report can be written later.

    Raises:
        UsageError: if a report is there and ``force`` is off, or the place is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file; give a folder")
    there = [folder / name for name in FILES if os.path.lexists(folder / name)]
    if there and not force:
        raise UsageError(f"'{there[0]}' exists; choose another folder, or replace it with --force")
    if any(path.is_dir() for path in there):
        raise UsageError(f"'{folder}' has a folder in the place of a report; choose another one")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise UsageError(f"the folder '{folder.absolute().parent}' does not exist; create it first")
    try:
        check_writable(folder / FILES[0] if folder.exists() else folder)
    except OSError as error:
        raise UsageError(f"cannot write '{folder}': {error.strerror or one_line(error)}") from error


def write_report(folder: Path, report: dict[str, Any], page: str) -> list[str]:
    """Writes both files, or none, and leaves no empty folder behind.

    Raises:
        EnvironmentProblem: if that fails after all.
    """
    targets = [folder / name for name in FILES]
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        with staged(*targets) as (record, document):
            text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
            record.write_text(text + "\n", encoding="utf-8")
            document.write_text(page, encoding="utf-8")
    except OSError as error:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise EnvironmentProblem(f"cannot write the report: {one_line(error)}") from error
    return [str(path) for path in targets]
