"""What a cache did: its decisions, put together for people, for JSON and for the picture."""

from .cache_report import CacheReport, cache_report, reused_places
from .rows import Cell, Row
from .speed import Speed, combined_fraction, combined_speedup, predicted_speedup

__all__ = [
    "CacheReport",
    "Cell",
    "Row",
    "Speed",
    "cache_report",
    "combined_fraction",
    "combined_speedup",
    "predicted_speedup",
    "reused_places",
]
