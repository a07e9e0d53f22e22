"""Runs caches on models: what is decided at each call, what is kept, and the hooks by which a model is told."""

from .attach import attach
from .cache_engine import CacheEngine

__all__ = ["CacheEngine", "attach"]
