"""Values that go into files and onto the screen as strict JSON."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """Turns a value into strict JSON: infinity becomes ``"inf"``, sets become sorted lists, the unknown its text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
