"""The shapes world: a closed procedural world, a pipeline trained on it, and a judge that knows the truth."""

from __future__ import annotations

from pathlib import Path

MODELS = {"shapes-wan": "wan"}


def path(name: str = "shapes-wan") -> Path:
    """Folder of a shipped pipeline, in diffusers' own format.

    Args:
        name: ``"shapes-wan"``, or its short form ``"wan"``.

    Raises:
        ValueError: if no model of that name ships with the package.
        FileNotFoundError: if its weights are missing from this installation.
    """
    folder = MODELS.get(name, name)
    if folder not in MODELS.values():
        raise ValueError(f"no shipped model is called {name!r}; choose one of {', '.join(MODELS)}")
    found = Path(__file__).parent / "weights" / folder
    if not (found / "model_index.json").exists():
        raise FileNotFoundError(f"the weights of {name!r} are missing from {found}; reinstall dit-accel")
    return found
