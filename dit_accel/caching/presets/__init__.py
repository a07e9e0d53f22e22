"""The caches of the papers, and one of our own: functions that return a recipe (``Cache``), or several.

All settings are keywords. One whose settings depend on the model takes it as ``root``.
"""

from __future__ import annotations

from .dbcache import dbcache, prune
from .delta import delta_dit
from .dicache import dicache
from .easycache import easycache
from .fbcache import fbcache
from .lookup import Preset, preset_by_name, settings_of
from .magcache import magcache
from .modules import fastercache, fora, pab, taylorseer
from .profiling import profiling
from .seacache import seacache
from .snr_gap import snr_gap
from .static import static
from .taylor_lite import taylorseer_lite
from .teacache import teacache
from .unet import deepcache, tgate

#: Presets by name.
PRESETS: dict[str, Preset] = {
    "dbcache": dbcache,
    "deepcache": deepcache,
    "delta_dit": delta_dit,
    "dicache": dicache,
    "easycache": easycache,
    "fastercache": fastercache,
    "fbcache": fbcache,
    "fora": fora,
    "magcache": magcache,
    "pab": pab,
    "profiling": profiling,
    "prune": prune,
    "seacache": seacache,
    "snr_gap": snr_gap,
    "static": static,
    "taylorseer": taylorseer,
    "taylorseer_lite": taylorseer_lite,
    "teacache": teacache,
    "tgate": tgate,
}

__all__ = ["PRESETS", "preset_by_name", "settings_of", *PRESETS]
