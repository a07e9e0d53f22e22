"""Which blocks may be skipped, since they look mainly at the background (ProfilingDiT, arXiv 2504.03140)."""

from .cost import blocks_for, cost, predicted_speedup
from .masks import MaskSource, Saliency, Scene, SubjectWords
from .profile import BlockProfile, load_profile
from .runner import profile_blocks
from .search import Found, find_subset
from .search_runner import search_blocks

__all__ = [
    "BlockProfile",
    "Found",
    "MaskSource",
    "Saliency",
    "Scene",
    "SubjectWords",
    "blocks_for",
    "cost",
    "find_subset",
    "load_profile",
    "predicted_speedup",
    "profile_blocks",
    "search_blocks",
]
