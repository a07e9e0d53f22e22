"""Output files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(*targets: Path) -> Iterator[list[Path]]:
    """Gives one scratch path beside each target; on success all are renamed, on any error all are removed.

    A scratch path keeps the suffix of its target. A target whose scratch file was never written is left as it was.

    Args:
        *targets: the files to be written. Their folders must exist.

    Yields:
        The scratch paths, in the order of the targets.

    Raises:
        OSError: if a finished file cannot be renamed to its target.
    """
    scratch = [target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}") for target in targets]
    try:
        yield scratch
        for written, target in zip(scratch, targets, strict=True):
            if written.exists():
                os.replace(written, target)
    finally:
        for leftover in scratch:
            leftover.unlink(missing_ok=True)


def check_writable(target: Path) -> None:
    """Finds out whether a file can be created beside ``target`` by creating and removing one.

    Raises:
        OSError: the reason why not.
    """
    with staged(target) as (scratch,):
        scratch.touch()
        scratch.unlink()
