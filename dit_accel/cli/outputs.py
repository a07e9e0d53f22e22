"""The files of one rendering: the videos, and the record beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.files import check_writable, staged

from .errors import EnvironmentProblem, UsageError, one_line
from .plain import plain
from .versions import versions

if TYPE_CHECKING:
    from .jobs import Job
    from .settings import Settings


@dataclass(frozen=True)
class Targets:
    """Where each output goes; ``dense`` and ``side_by_side`` if dense is rendered too, ``picture`` if it is wanted."""

    video: Path
    record: Path
    dense: Path | None = None
    side_by_side: Path | None = None
    picture: Path | None = None

    @classmethod
    def beside(cls, output: Path, compare: bool, picture: Path | None = None) -> Targets:
        """Derives all names from that of the video, but that of the picture of the schedule, which is given.

        Raises:
            UsageError: if the video does not end in ``.mp4``.
        """
        output = output.expanduser()
        if output.suffix.lower() != ".mp4":
            raise UsageError(f"the output must end in .mp4, got '{output}'")
        dense, both = (output.with_suffix(f".{name}.mp4") if compare else None for name in ("dense", "compare"))
        picture = None if picture is None else picture.expanduser()
        return cls(output, output.with_suffix(".json"), dense, both, picture)

    def all(self) -> list[Path]:
        """Every file that will be written."""
        every = (self.video, self.record, self.dense, self.side_by_side, self.picture)
        return [path for path in every if path is not None]

    def check_sources(self, sources: Iterable[str | Path], flag: str = "--output") -> None:
        """Makes sure that nothing is written over a file that the command reads.

        Args:
            sources: paths of those files; texts that are no paths do no harm.
            flag: the option that names the output.

        Raises:
            UsageError: if one of them is also an output, whether or not it may be replaced.
        """
        for source in sources:
            for path in self.all():
                if _real(source) == _real(path):
                    named_by = "--schedule-picture" if path is self.picture else flag
                    raise UsageError(
                        f"'{source}' is read by this command and would be replaced; choose another {named_by}"
                    )

    def check(self, force: bool) -> None:
        """Makes sure now that everything can be written later.

        Raises:
            UsageError: if a file exists and ``force`` is off, or a place is not writable.
        """
        for path in self.all():
            if path.is_dir():
                raise UsageError(f"'{path}' is a folder; give the name of a file to write")
            if os.path.lexists(path) and not force:
                raise UsageError(f"'{path}' exists; choose another name, or replace it with --force")
            if not path.parent.is_dir():
                raise UsageError(f"the folder '{path.parent}' does not exist; create it first")
            try:
                check_writable(path)
            except OSError as error:
                reason = error.strerror or one_line(error)
                raise UsageError(f"cannot write '{path}': {reason}; choose another place") from error


def checked_file(out: Path, suffix: str, reads: Iterable[str | Path], force: bool) -> Path:
    """The one file that a command writes, named by ``--out``, after making sure that it can be written later.

    Args:
        out: as given.
        suffix: that it must have.
        reads: files that the command reads.
        force: whether another file may be replaced.

    Raises:
        UsageError: if it has another suffix, and as :meth:`Targets.check_sources` and :meth:`Targets.check`.
    """
    out = out.expanduser()
    if out.suffix != suffix:
        raise UsageError(f"the output must end in {suffix}, got '{out}'")
    targets = Targets(video=out, record=out)
    targets.check_sources(reads, "--out")
    targets.check(force)
    return out


def _real(path: str | Path) -> str:
    """The same for every way to name a file; the file need not be there."""
    return os.path.realpath(os.path.expanduser(path))


def write_outputs(targets: Targets, settings: Settings, job: Job) -> dict[str, Any]:
    """Writes all files, or none.

    Returns:
        The record, as in the file beside the video.

    Raises:
        EnvironmentProblem: if the files cannot be written after all.
    """
    files = [str(path) for path in targets.all()]
    record: dict[str, Any] = plain({**_common(settings, job), **job.record(), "files": files})
    try:
        _write(targets, settings, job, record)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write the output: {one_line(error)}") from error
    return record


def _write(targets: Targets, settings: Settings, job: Job, record: dict[str, Any]) -> None:
    from dit_accel.video import encode_video, side_by_side

    common = plain(_common(settings, job))
    with staged(*targets.all()) as scratch:
        at = dict(zip(targets.all(), scratch, strict=True))
        encode_video(at[targets.video], job.main.frames, settings.fps, common)
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        at[targets.record].write_text(text, encoding="utf-8")
        if targets.dense is not None and targets.side_by_side is not None and job.dense is not None:
            plainly = {**common, "attention": {"method": "dense"}, "cache": None}
            encode_video(at[targets.dense], job.dense.frames, settings.fps, plainly)
            both = side_by_side(job.dense.frames, job.main.frames, ("dense", settings.label))
            encode_video(at[targets.side_by_side], both, settings.fps, common)
        if targets.picture is not None and job.picture is not None:
            at[targets.picture].write_bytes(job.picture)


def _common(settings: Settings, job: Job) -> dict[str, Any]:
    """What identifies a rendering: enough to make it again."""
    frames, height, width, _ = job.main.frames.shape
    size = {"frames": frames, "height": height, "width": width}
    return {**settings.record(), **size, "versions": versions()}
