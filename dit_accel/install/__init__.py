"""The three seams on an unmodified model: its calls (step), its blocks (block), its attention calls (attend)."""

from .blocks import BlockHook, BlockInfo, BlockRecorder
from .interception import BoundProcessor
from .permutation import TokenPermutation
from .root import RootInstallation
from .site import Site

__all__ = ["BlockHook", "BlockInfo", "BlockRecorder", "BoundProcessor", "RootInstallation", "Site", "TokenPermutation"]
