"""Where the attention is: the transformers or UNets of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from .families import UnknownModelError, family_of, is_known


def find_roots(target: Any) -> dict[str, nn.Module]:
    """The transformers or UNets of a pipeline by attribute name, or the model itself as ``"model"``.

    Raises:
        UnknownModelError: if there is none of a registered family.
    """
    candidates = {"model": target} if isinstance(target, nn.Module) else dict(getattr(target, "components", {}))
    for name, module in candidates.items():
        if hasattr(module, "_orig_mod"):
            raise ValueError(f"{name} is compiled already; accelerate it first, then call its compile()")
    roots = {name: module for name, module in candidates.items() if isinstance(module, nn.Module) and is_known(module)}
    if not roots:
        models = [candidates[name] for name in ("transformer", "unet", "model") if candidates.get(name) is not None]
        if models:
            family_of(models[0])
        raise UnknownModelError(f"{type(target).__name__} is neither a diffusers pipeline nor a model dit_accel knows")
    return roots
