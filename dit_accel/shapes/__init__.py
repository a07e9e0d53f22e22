"""The shapes zoo: a closed procedural world, pipelines trained on it, and a judge that knows the truth."""

from __future__ import annotations

from pathlib import Path

MODELS = {"shapes-wan": "wan"}  # what ships: name to folder of weights/


def path(name: str = "shapes-wan") -> Path:
    """Folder of a shipped pipeline, in diffusers' own format.

    Args:
        name: one of ``MODELS``, such as ``"shapes-wan"``, or its short form ``"wan"``.

    Raises:
        ValueError: if no model of that name ships with the package.
        FileNotFoundError: if its weights are missing from this installation.
    """
    folder = MODELS.get(name, name)
    if folder not in MODELS.values():
        raise ValueError(f"no shipped model is called {name!r}; choose one of {', '.join(MODELS)}")
    found = Path(__file__).parent / "weights" / folder
    if not all((found / file).is_file() for file in ("model_index.json", "shapes.json")):
        raise FileNotFoundError(f"the weights of {name!r} are missing from {found}; reinstall dit-accel")
    return found
