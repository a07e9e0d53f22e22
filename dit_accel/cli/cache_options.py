"""The options of feature caches: which one, how it is set, and where its schedule is drawn."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UsageError, one_line

if TYPE_CHECKING:
    from dit_accel.quality.profile import Profile

PICTURES = (".svg", ".png")


class CacheChoice(NamedTuple):
    """The cache of a rendering; nothing but None for none.

    Attributes:
        preset: name of a preset.
        settings: of the preset.
        profile: file of a tuned cache, in place of a preset.
        picture: file for the schedule, ``.svg`` or ``.png``.
    """

    preset: str | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012  # never written to
    profile: Path | None = None
    picture: Path | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self.preset is not None or self.profile is not None

    @property
    def label(self) -> str | None:
        """What it is called beside a video."""
        return self.preset or (None if self.profile is None else self.profile.stem)

    def record(self) -> dict[str, Any] | None:
        """As it is written to files."""
        if self.profile is not None:
            return {"profile": str(self.profile)}
        return None if self.preset is None else {"preset": self.preset, **self.settings}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares them. The presets are named by the package, which is not loaded for this."""
    group = parser.add_argument_group("feature cache", "parts of the model are reused from step to step")
    group.add_argument(
        "--cache", metavar="NAME", help="a preset, such as easycache or fbcache; an unknown name lists all"
    )
    group.add_argument(
        "--cache-option",
        action="append",
        type=key_and_value,
        metavar="KEY=VALUE",
        help="a setting of the preset, such as threshold=0.1 or background=[0,1]; may be given several times",
    )
    group.add_argument("--profile", type=Path, metavar="FILE", help="a tuned cache, in place of --cache")
    group.add_argument(
        "--schedule-picture", type=Path, metavar="OUT.svg", help="draw what was computed and reused, .svg or .png"
    )


def key_and_value(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``, the value as JSON (``0.1``, ``true``, ``null``, ``[1, 2]``) or else as text."""
    key, equals, value = text.partition("=")
    if not (equals and key.strip()):
        raise argparse.ArgumentTypeError(f"give KEY=VALUE, such as threshold=0.1, got {text!r}")
    try:
        return key.strip().replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return key.strip().replace("-", "_"), value


def choice_of(options: argparse.Namespace) -> CacheChoice:
    """The cache that was asked for, checked as far as the model is not needed for it.

    Raises:
        UsageError: if options do not go together, or name what is not there.
    """
    picture: Path | None = options.schedule_picture
    _check_together(options)
    if picture is not None and picture.suffix.lower() not in PICTURES:
        raise UsageError(f"--schedule-picture must end in {' or '.join(PICTURES)}, got '{picture}'")
    if options.profile is not None:
        profile = load(options.profile)
        if picture is not None and profile.is_off:
            raise UsageError(
                f"--schedule-picture: the profile '{options.profile}' is off, so there is no schedule to draw"
            )
        return CacheChoice(profile=options.profile, picture=picture)
    if options.cache is None:
        return CacheChoice()
    settings = _without_repeats(options.cache_option or ())
    return CacheChoice(_checked(options.cache, settings), settings, picture=picture)


def load(path: Path) -> Profile:
    """Reads a profile.

    Raises:
        UsageError: if it is none.
    """
    from dit_accel.quality.profile import load_profile

    try:
        return load_profile(path)
    except ValueError as error:
        raise UsageError(f"--profile: {one_line(error)}") from error


def check_steps(path: Path, steps: int | None) -> None:
    """Refuses a rendering of another number of steps than a profile was made for; one that is off fits any.

    Raises:
        UsageError: naming the number that fits.
    """
    profile = load(path)
    if not profile.is_off and None not in (steps, profile.asked_steps) and steps != profile.asked_steps:
        raise UsageError(
            f"--profile '{path}' was made for {profile.asked_steps} steps and this run has {steps}; give --steps "
            f"{profile.asked_steps}, or make another profile by dit-accel tune"
        )


def _check_together(options: argparse.Namespace) -> None:
    if options.cache is not None and options.profile is not None:
        raise UsageError("--cache and --profile both name a cache; leave one of them out")
    if options.cache is None and options.cache_option:
        raise UsageError("--cache-option sets a preset; name it by --cache")
    if options.cache is None and options.profile is None and options.schedule_picture is not None:
        raise UsageError("--schedule-picture draws the schedule of a cache; name one by --cache or --profile")


def _without_repeats(given: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    settings = dict(given)
    if len(settings) < len(given):
        twice = next(key for key, _ in given if [name for name, _ in given].count(key) > 1)
        raise UsageError(f"--cache-option {twice} is given more than once; leave all but one out")
    return settings


def _checked(name: str, settings: dict[str, Any]) -> str:
    """The preset's name as the package has it; its values are checked here too, unless it depends on the model."""
    from dit_accel.caching.presets import PRESETS, preset_by_name, settings_of

    known = name.replace("-", "_")
    try:
        if known not in PRESETS:
            preset_by_name(name)  # refuses it, naming those there are
        preset = PRESETS[known]
        unknown = next((key for key in settings if key not in settings_of(preset)), None)
        if unknown is not None or "root" not in inspect.signature(preset).parameters:
            preset_by_name(known, None, settings)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--cache {name}: {one_line(error)}") from error
    return known
