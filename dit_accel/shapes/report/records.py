"""Results as JSON that people read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...files import staged

Record = dict[str, Any]
_FLAT_LIST = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s+\]")  # JSON strings hold no line breaks, so this is none of them


def write_json(file: Path, content: Record) -> None:
    """Writes a readable JSON file, whole or not at all; its folder is made if need be. Flat lists take one line."""
    text = json.dumps(content, indent=1, allow_nan=False)
    text = _FLAT_LIST.sub(lambda match: "[" + re.sub(r"\n\s+", " ", match[1]) + "]", text)
    file.parent.mkdir(parents=True, exist_ok=True)
    with staged(file) as (scratch,):
        scratch.write_text(text + "\n")
