"""What a profile was measured for: model, schedule, size, guidance, precision, attention."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..roots import find_roots

Guidance = tuple[float | None, float | None]
UNKNOWN = "unknown"
_LOOKED_AT = 8  # weights whose first values make the fingerprint
_HASHED = {
    "config": "configuration of the model",
    "weights": "weights of the model",
    "noise": "settings of the scheduler",
}


@dataclass(frozen=True)
class Key:
    """The conditions of a measurement. None stands for what a pipeline does not say.

    Attributes:
        pipeline: class of the pipeline.
        model: name or folder that it was loaded from; told, but not compared, since folders move.
        config: hash of the configuration of its transformers or UNet.
        weights: hash of a few values of their weights, which tells revisions, finetunes and LoRAs apart.
        scheduler: class of its scheduler.
        shift: of the noise schedule.
        dtype: of the weights.
        attention: ``"stock"``, or what replaces it.
        steps: number of sampling steps.
        frames: token frames; 1 for images.
        size: tokens in height and width.
        guidance: scale of guidance.
        guidance_2: that of a second expert (Wan 2.2).
        noise: hash of the settings of its scheduler, of which ``shift`` is one.
    """

    pipeline: str
    model: str
    config: str
    weights: str
    scheduler: str
    shift: float | None
    dtype: str
    attention: str = "stock"
    steps: int | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    noise: str = UNKNOWN

    def of_run(self, steps: int | None, grid: tuple[int, int, int], guidance: Guidance) -> Key:
        """The same model in one generation; ``guidance`` as :func:`guidance_of` tells it."""
        return replace(
            self, steps=steps, frames=grid[0], size=(grid[1], grid[2]), guidance=guidance[0], guidance_2=guidance[1]
        )

    def model_differences(self, other: Key) -> list[str]:
        """What differs in the model itself, in words, see :meth:`differences`."""
        names = ["pipeline", "config", "scheduler", "shift", "dtype", "attention"]
        if self.dtype == other.dtype and UNKNOWN not in (self.weights, other.weights):
            names.append("weights")
        if (self.scheduler, self.shift) == (other.scheduler, other.shift) and UNKNOWN not in (self.noise, other.noise):
            names.append("noise")
        return [_said(name, self, other) for name in names if not _same(getattr(self, name), getattr(other, name))]

    def differences(self, other: Key) -> list[str]:
        """What differs in another run, in words; sizes differ once they leave the bucket."""
        found = self.model_differences(other)
        for name in ("steps", "frames", "guidance", "guidance_2"):
            if not _same(getattr(self, name), getattr(other, name)):
                found.append(_said(name, self, other))
        if self.size and other.size and not same_bucket(self.size, other.size):
            found.append(_said("size", self, other))
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"size": None if self.size is None else list(self.size)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Key:
        """Back from plain values.

        Raises:
            ValueError: for other entries than its own.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or not known - {"noise"} <= set(values) <= known:
            raise ValueError(f"the key of a profile has the entries {', '.join(sorted(known))}")
        size = values["size"]
        kinds: dict[str, Any] = dict.fromkeys(("steps", "frames"), int) | dict.fromkeys(
            ("shift", "guidance", "guidance_2"), Real
        )
        for name in set(values) - {"size"}:
            if not isinstance(values[name], kinds.get(name, str)) and (name not in kinds or values[name] is not None):
                raise ValueError(f"{name} of the key is {values[name]!r}")
        return cls(**{**values, "size": None if size is None else (int(size[0]), int(size[1]))})


def same_bucket(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two sizes are alike: areas within a factor of 1.41, aspect ratios within one of 1.19."""
    area = math.log2(first[0] * first[1] / (second[0] * second[1]))
    aspect = math.log2(first[0] * second[1] / (first[1] * second[0]))
    return abs(area) <= 0.5 and abs(aspect) <= 0.25


def key_of(pipe: Any, attention: str = "stock") -> Key:
    """The key of a pipeline's model; :meth:`Key.of_run` adds what its calls say.

    Args:
        pipe: a diffusers pipeline.
        attention: what replaces its attention.
    """
    roots = find_roots(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    settings = getattr(scheduler, "config", {}) or {}
    shift = next((settings[name] for name in ("flow_shift", "shift") if settings.get(name) is not None), None)
    first = next(iter(roots.values()))
    return Key(
        pipeline=type(pipe).__name__,
        model=str(config_of(pipe).get("_name_or_path") or UNKNOWN),
        config=_hash([type(root).__name__, _public(config_of(root))] for root in roots.values()),
        weights=_weights(roots),
        scheduler=type(scheduler).__name__,
        shift=None if shift is None else float(shift),
        dtype=str(next(first.parameters()).dtype).removeprefix("torch."),
        attention=attention,
        noise=_hash([_public(config_of(scheduler))]),
    )


def guidance_of(pipe: Any) -> Guidance:
    """The scale of guidance of the call that is running or ran last, and that of a second expert; None for neither.

    Some pipelines change it from step to step; what it was when a generation began is the one to compare.
    """
    values = (getattr(pipe, name, None) for name in ("_guidance_scale", "_guidance_scale_2"))
    first, second = (float(value) if isinstance(value, (int, float)) else None for value in values)
    return first, second


def fingerprint(part: nn.Module) -> list[str]:
    """Class, hash of the configuration and hash of the weights of any model in a pipeline, as in a :class:`Key`."""
    return [type(part).__name__, _hash([_public(config_of(part))]), _weights({"": part})]


def config_of(part: Any) -> dict[str, Any]:
    """The configuration of a part of a pipeline; those of transformers are no mappings."""
    config = getattr(part, "config", None) or {}
    return dict(config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)())


def _public(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in sorted(config.items()) if not name.startswith("_")}


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()[:16]


def _weights(roots: Mapping[str, nn.Module]) -> str:
    """Names and shapes of all weights, and the first values of some; unknown where they are not in memory.

    Of adapters that are on, as LoRAs, the strengths as well, which are no weights.
    """
    parts: list[Any] = []
    for name, root in sorted(roots.items()):
        weights = list(root.named_parameters())
        parts.append([name, [(path, list(weight.shape)) for path, weight in weights]])
        for path, weight in weights[:: max(1, len(weights) // _LOOKED_AT)]:
            if weight.is_meta:
                return UNKNOWN
            values = weight.detach().flatten()[:16].to("cpu", torch.float32)
            parts.append([path, [f"{value:.3g}" for value in values.tolist()]])
        if strengths := _strengths(root):
            parts.append(strengths)
    return _hash(parts)


def _strengths(root: nn.Module) -> list[str]:
    """Path, name and strength of every adapter that is on, as peft's layers tell them."""
    found = []
    for path, layer in root.named_modules():
        strengths = getattr(layer, "scaling", None)
        if isinstance(strengths, dict) and not getattr(layer, "disable_adapters", False):
            active = getattr(layer, "active_adapters", strengths)
            found += [f"{path} {name} {float(strengths[name]):.6g}" for name in active if name in strengths]
    return found


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=1e-6)
    return bool(first == second)


def _said(name: str, made: Key, here: Key) -> str:
    if name in _HASHED:
        return f"other {_HASHED[name]}"
    return f"{name} {getattr(here, name)} in place of {getattr(made, name)}"
