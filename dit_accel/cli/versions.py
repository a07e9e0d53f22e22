"""Which versions of what are at work."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("torch", "diffusers", "transformers")


def package_version() -> str:
    """The version of dit_accel."""
    import dit_accel

    return str(dit_accel.__version__)


def installed(name: str) -> str | None:
    """The version of a distribution, or None if it is not installed. Imports nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions that a result depends on, for the record."""
    return {
        "dit_accel": package_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: installed(name) for name in PACKAGES},
    }
