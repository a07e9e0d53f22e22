"""The report of an inspection, as one JSON-ready record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .advice import advise
from .inspection import InspectionRecorder
from .recorder import Record

FORMAT = "dit-accel inspect 1"


def build_report(
    recorder: InspectionRecorder,
    *,
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    density: float,
    not_compared: Mapping[str, str],
    seconds: float,
) -> Record:
    """Puts together what was measured and what follows.

    Args:
        recorder: after the generation.
        settings: of the generation: at least ``model``, ``pipeline``, ``prompt``, ``seed`` and ``steps``.
        environment: versions and the machine.
        density: at which methods were compared.
        not_compared: methods that cannot act on the model, and why.
        seconds: the generation took, measuring included.

    Raises:
        ValueError: if nothing was recorded.
    """
    layers = recorder.by_layer()
    if not layers:
        raise ValueError("the model has no self-attention or joint attention that ran at the steps to look at")
    chosen = recorder.chosen_settings()[layers[0]["expert"], layers[0]["path"]]
    return {
        "format": FORMAT,
        "settings": dict(settings),
        "environment": dict(environment),
        "seconds": round(seconds, 2),
        "at": sorted(recorder.at),
        "density": density,
        "densities": list(recorder.densities),
        "blocks": list(recorder.blocks),
        "methods": chosen,
        "not_compared": dict(not_compared) | _refused(layers),
        "advice": advise(layers, recorder.candidates),
        "layers": layers,
    }


def _refused(layers: list[Record]) -> dict[str, str]:
    """Methods that could act in no layer, with the reason that the first gave."""
    names = {name for layer in layers for name in layer["refused"]}
    nowhere = sorted(name for name in names if not any(name in layer["methods"] for layer in layers))
    return {name: next(layer["refused"][name] for layer in layers if name in layer["refused"]) for name in nowhere}
