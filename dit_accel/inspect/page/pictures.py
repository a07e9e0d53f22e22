"""Small maps as PNG pictures inside the page."""

from __future__ import annotations

import base64
import io
import math

from torch import Tensor

from .colors import ramp

MOST = 16.0  # times uniform attention has the lightest color, a sixteenth of it the darkest


def mass_image(picture: Tensor) -> str:
    """A data address of a ``[cells, cells]`` map of attention relative to uniform, on a logarithmic scale."""
    return _png((picture.clamp_min(1 / MOST).log2() / math.log2(MOST) + 1) / 2)


def mask_image(picture: Tensor) -> str:
    """A data address of a ``[cells, cells]`` map of kept parts in [0, 1]."""
    return _png(picture)


def _png(values: Tensor) -> str:
    from PIL import Image

    height, width = values.shape
    levels = bytes((values.clamp(0, 1) * 255).round().int().flatten().tolist())
    image = Image.frombytes("P", (width, height), levels)
    image.putpalette([part for level in range(256) for part in ramp(level / 255)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
