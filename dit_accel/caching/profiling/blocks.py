"""The transformer blocks of a model, and which attention module belongs to which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ...families import family_of
from ...roots import find_roots


def block_paths(root: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks in execution order.

    Raises:
        ValueError: for a UNet, whose blocks are no stack that keeps its shape.
    """
    family = family_of(root)
    if "up_blocks" in family.block_lists:
        raise ValueError(
            f"{type(root).__name__} has no stack of equal blocks to tell foreground from background by; take the "
            "preset deepcache or tgate for UNets"
        )
    paths: list[str] = []
    for name in family.block_lists:
        found = getattr(root, name)
        is_list = isinstance(found, (nn.ModuleList, nn.Sequential))
        paths += [f"{name}.{index}" for index in range(len(found))] if is_list else [name]
    return tuple(paths)


def block_of(paths: tuple[str, ...], site: str) -> int | None:
    """Index of the block that an attention module is in; None outside all."""
    return next((index for index, path in enumerate(paths) if site.startswith(f"{path}.")), None)


def experts_of(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, which must be alike: one list of blocks holds for all.

    Raises:
        ValueError: if they differ in class or number of blocks.
    """
    roots = find_roots(pipe)
    kinds = {name: (type(root).__name__, len(block_paths(root))) for name, root in roots.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"one list of blocks cannot serve {_listed(kinds.items())}; profile them one by one")
    return roots


def _listed(kinds: Iterable[tuple[str, tuple[str, int]]]) -> str:
    return " and ".join(f"{name} ({kind} of {count} blocks)" for name, (kind, count) in kinds)
