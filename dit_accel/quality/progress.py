"""Pairs on disk as they are measured, so that a tuning that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..files import check_writable
from ..journal import Journal
from ..machine import device_name
from .key import UNKNOWN, Key, config_of, fingerprint
from .pairs import Pair
from .sampling import Sampler
from .spec import CacheSpec

FORMAT = "dit-accel progress of tuning, version 1"


class Progress:
    """Every pair of a tuning in a file, written before the next one is run.

    Args:
        file: made at the first pair, its folder at once.
        prompts: of the tuning, those held out last.
        context: everything that pairs depend on, see :func:`context_of`.

    Attributes:
        file: as given.
        pairs: all that are known, by cache and number of the prompt.

    Raises:
        ValueError: if the file holds pairs of other settings, or is damaged.
        OSError: if it cannot be written.
    """

    def __init__(self, file: Path, prompts: Sequence[str], context: dict[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        check_writable(file)
        self.file, self._prompts = file, tuple(prompts)
        self._journal = Journal(file, {"format": FORMAT, "prompts": list(prompts), **context})
        self.pairs: dict[tuple[CacheSpec, int], Pair] = {}
        for _, record in sorted(self._journal.records.items()):
            self._take(record)

    def add(self, spec: CacheSpec, number: int, pair: Pair) -> None:
        """Stores a pair, on disk before returning; the latest of a cache and a prompt counts."""
        values = {name: _kept(value) for name, value in asdict(pair).items() if name != "prompt"}
        record = {"cache": spec.to_json(), "number": number, "pair": values}
        self._journal.add(len(self._journal.records), record)
        self.pairs[spec, number] = pair

    def _take(self, record: Mapping[str, Any]) -> None:
        try:
            number = record["number"]
            values: dict[str, Any] = {
                name: None if value is None else float(value) for name, value in record["pair"].items()
            }
            self.pairs[CacheSpec.from_json(record["cache"]), number] = Pair(self._prompts[number], **values)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self.file} is damaged ({error}); delete it to start again") from error


def context_of(sampler: Sampler, key: Key) -> dict[str, Any]:
    """Everything that pairs depend on besides their prompts: models, sampler, call, noise, versions, machine.

    Raises:
        ValueError: if the weights of a model are in no memory, so that others in their place would not be noticed.
    """
    settings = config_of(getattr(sampler.pipe, "scheduler", None))
    return {
        "key": {name: value for name, value in key.to_json().items() if name != "model"},  # folders move
        "scheduler": {name: _said(value) for name, value in sorted(settings.items()) if not name.startswith("_")},
        "parts": _parts(sampler.pipe),
        "call": {name: _said(value) for name, value in sorted(sampler.settings.items())},
        "seed": sampler.seed,
        "versions": {"dit_accel": __version__, "torch": str(torch.__version__), "diffusers": diffusers.__version__},
        "machine": device_name(sampler.device),
    }


def _parts(pipe: Any) -> dict[str, list[str]]:
    """Fingerprints of all models: text encoders and autoencoders make pairs, too."""
    models = {name: part for name, part in sorted(pipe.components.items()) if isinstance(part, nn.Module)}
    found = {name: fingerprint(model) for name, model in models.items()}
    unknown = [name for name, said in found.items() if UNKNOWN in said]
    if unknown:
        raise ValueError(
            f"weights of {', '.join(unknown)} are on no device, as after enable_sequential_cpu_offload(), so progress "
            "could not tell them from others; leave progress out, or put the pipeline on a device"
        )
    return found


def _kept(value: float | None) -> float | str | None:
    """Strict JSON has no infinity, so that becomes its text."""
    return value if value is None or math.isfinite(value) else str(value)


def _said(value: Any) -> Any:
    """An argument of the call as JSON; pictures and tensors by a hash of what they hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _said(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_said(each) for each in value]
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray) or hasattr(value, "tobytes"):
        return f"{type(value).__name__} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    return repr(value)
