"""The inner part of a UNet as one unit (DeepCache, arXiv 2312.00858)."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.unet import check_deep, skipped_paths
from ..unit import Unit
from .base import RootView, Scope


@dataclass(frozen=True)
class Deep(Scope):
    """All inside one skip connection of a UNet; :mod:`dit_accel.caching.engine.unet` says how these are numbered.

    Attributes:
        branch: the skip connection, from 0, the outermost; the greater, the more layers always run.
    """

    branch: int = 0

    def units(self, view: RootView) -> tuple[Unit, ...]:
        """See :meth:`Scope.units`; the unit's ``first`` is the branch."""
        if not view.is_unet or not all(hasattr(view.root, name) for name in ("down_blocks", "mid_block", "up_blocks")):
            raise ValueError(
                f"{view.name} is no UNet with down_blocks, mid_block and up_blocks; for transformers take a scope of "
                "blocks, such as Whole or Tail"
            )
        check_deep(view.root, self.branch)
        inside = skipped_paths(view.root, self.branch)
        return (Unit(f"deep {self.branch}", "deep", first=self.branch, inside=inside),)
