"""What tuning found, in a file: a cache or the reason why there is none, and what it was measured on."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..caching.recipe import Cache
from ..files import staged
from .key import Key
from .spec import CacheSpec
from .target import Target

FORMAT = "dit-accel quality profile, version 1"
HOW_TO_TUNE = (
    "make one by dit_accel.tune(pipe, target_psnr=28, prompts=[...], held_out=[...], num_inference_steps=...) or "
    'dit-accel tune "PROMPT" "PROMPT" ... --target-psnr 28 -o profile.json'
)


class ProfileWarning(UserWarning):
    """A profile that is off, or used outside of what it was measured for."""


@dataclass(frozen=True)
class Profile:
    """A tuned cache with its evidence.

    Attributes:
        target: what it keeps.
        key: what it was measured for.
        spec: the cache; None if the profile says to run dense.
        reason: why this one, or why none.
        measured: of the cache that was chosen: ``speed_up`` (wall time dense / cached, alternating in one process),
            by metric its ``worst`` and ``median`` over all prompts, ``prompts`` and ``held_out`` (their number), and
            ``pairs``, one record for each prompt. Empty if there is none.
        noise_floor: PSNR, SSIM and relative error between dense runs from the same noise.
        candidates: one record for each cache that was run, the fastest first: ``cache`` and ``verdict`` in words,
            ``speed_up``, and ``worst`` and ``median`` of each metric over the prompts it was run on.
        settings: what tuning was told: margin, prompts, seed, the settings of the call and its steps; and what it
            took: ``generations``, and by how many caches the held-out prompts were asked (``judged_by_held_out``).
        alarms: what is to be looked at, in words, such as lost motion.
    """

    target: Target
    key: Key
    spec: CacheSpec | None
    reason: str
    measured: dict[str, Any] = field(default_factory=dict)
    noise_floor: dict[str, Any] = field(default_factory=dict)
    candidates: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()

    @property
    def is_off(self) -> bool:
        """Whether it says to run dense."""
        return self.spec is None

    @property
    def misses_target(self) -> bool:
        """Whether caches were run, and none of them serves for the quality that was asked for."""
        return self.is_off and not self.target.is_time and bool(self.candidates)

    @property
    def asked_steps(self) -> int | None:
        """The ``num_inference_steps`` it was tuned with; some samplers (PNDM, Heun) make more steps of them."""
        asked: int | None = self.settings.get("asked_steps")
        return self.key.steps if asked is None else asked

    def cache(self) -> Cache | None:
        """The recipe for ``accelerate(pipe, cache=...)``; None, with a warning that says why, if it is off."""
        if self.spec is None:
            warnings.warn(f"dit_accel: no cache is used: {self.reason}", ProfileWarning, stacklevel=2)
            return None
        return self.spec.cache()

    def to_json(self) -> dict[str, Any]:
        """As strict JSON; infinities are the text ``"inf"``."""
        record: dict[str, Any] = _plain(
            {
                "format": FORMAT,
                "target": {"kind": self.target.kind, "value": self.target.value},
                "key": self.key.to_json(),
                "cache": None if self.spec is None else self.spec.to_json(),
                "reason": self.reason,
                "measured": self.measured,
                "noise_floor": self.noise_floor,
                "candidates": list(self.candidates),
                "settings": self.settings,
                "alarms": list(self.alarms),
            }
        )
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Profile:
        """Back from JSON.

        Raises:
            ValueError: if it is no profile, saying how to make one.
        """
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            raise ValueError(f"this is no {FORMAT}; {HOW_TO_TUNE}")
        try:
            cache = record["cache"]
            return cls(
                target=Target(**record["target"]),
                key=Key.from_json(record["key"]),
                spec=None if cache is None else CacheSpec.from_json(cache),
                reason=str(record["reason"]),
                measured=dict(record["measured"]),
                noise_floor=dict(record["noise_floor"]),
                candidates=tuple(record["candidates"]),
                settings=dict(record["settings"]),
                alarms=tuple(record["alarms"]),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"this profile is damaged ({error}); {HOW_TO_TUNE}") from error

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        path = Path(path)
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        with staged(path) as (scratch,):
            scratch.write_text(text + "\n", encoding="utf-8")
        return path


def _plain(value: Any) -> Any:
    """Strict JSON has no infinity, so that becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def load_profile(path: str | Path) -> Profile:
    """Reads a profile.

    Raises:
        ValueError: if the file is not there, or is none.
    """
    try:
        record = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the profile '{path}': {error}; {HOW_TO_TUNE}") from error
    try:
        return Profile.from_json(record)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
