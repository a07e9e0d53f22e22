"""The caches that diffusers ships, put on the same pipelines: what our checks find in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from .checks import Apply
from .subjects import STEPS, Case

Config = Callable[[Case], Any]


def diffusers_cache(config: Config) -> Apply:
    """Puts one of diffusers' caches on every model of a case, and takes off all that it left there."""

    @contextmanager
    def apply(case: Case) -> Iterator[None]:
        roots: list[Any] = case.roots()
        for root in roots:
            root.enable_cache(config(case))
        try:
            yield
        finally:
            for root in roots:
                root.disable_cache()
                _clear(root)

    return apply


def _clear(root: nn.Module) -> None:
    """Disabled, they leave a registry and a forward on modules, which the next user of the case would count."""
    for module in root.modules():
        vars(module).pop("_diffusers_hook", None)
        left = vars(module).pop("forward", None)
        assert left is None or left == MethodType(type(module).forward, module)


def pyramid(case: Case) -> Any:
    """Attention outputs broadcast to every other call."""
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: case.pipe.current_timestep,
    )


def first_block(threshold: float) -> Config:
    """FirstBlockCache."""
    from diffusers import FirstBlockCacheConfig

    return lambda _: FirstBlockCacheConfig(threshold=threshold)


def magnitude(_: Case) -> Any:
    """MagCache with ratios of 1, which never add up to an error: two steps in three are skipped."""
    from diffusers import MagCacheConfig

    return MagCacheConfig(
        threshold=0.5, max_skip_steps=2, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    )


def taylor(**settings: Any) -> Config:
    """TaylorSeer."""
    from diffusers import TaylorSeerCacheConfig

    return lambda _: TaylorSeerCacheConfig(**settings)
