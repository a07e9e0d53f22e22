"""Makes diffusers' own ``set_attn_processor`` accept our processors, without importing diffusers to do so.

Two classes of diffusers are extended, whenever they are imported. Pipelines gain ``set_attn_processor``, which they
lack; that of the models hands our processors to :func:`dit_accel.accelerate`. Nothing changes for stock processors.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any

_BETWEEN = ("diffusers", "huggingface_hub", "torch")  # what a user calls may lead to set_attn_processor through these


def extend_diffusers() -> None:
    """Extends the classes now if their modules are loaded, else as soon as they are."""
    for name, extend in _EXTENSIONS.items():
        if name in sys.modules:
            extend(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the ordinary machinery find our two modules, and runs the extension after their own code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        extend = _EXTENSIONS.get(fullname)
        if extend is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            stock = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                stock(module)
                extend(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _extend_pipelines(module: ModuleType) -> None:
    def set_attn_processor(self: Any, processor: Any) -> None:  # noqa: D417
        """Sets the attention processor of every transformer or UNet of this pipeline.

        Args:
            processor: one of dit_accel's processors, or whatever the models' own ``set_attn_processor`` takes.
        """
        from .entry import replace_processor

        replace_processor(self, processor)

    if not hasattr(module.DiffusionPipeline, "set_attn_processor"):
        module.DiffusionPipeline.set_attn_processor = set_attn_processor


def _extend_models(module: ModuleType) -> None:
    stock = module.AttentionMixin.set_attn_processor
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def set_attn_processor(self: Any, processor: Any) -> None:
        from .acceleration import acceleration_of
        from .entry import is_ours, replace_processor
        from .install import BoundProcessor

        accelerated = acceleration_of(self)
        if isinstance(processor, dict):
            # Some pipelines (PAG) and fuse_qkv_projections put back later what they found, which may have been ours.
            if accelerated is not None and any(map(accelerated.owns, processor.values())):
                stock(self, processor)
                return
            processor = {
                name: each.stock if isinstance(each, BoundProcessor) else each for name, each in processor.items()
            }
        if is_ours(processor) or accelerated is not None:
            replace_processor(self, processor)
            if accelerated is not None and accelerated.processor is not None and not is_ours(processor):
                _warn_if_unasked(type(accelerated.processor).__name__, acceleration_of(self) is not None)
            return
        stock(self, processor)

    module.AttentionMixin.set_attn_processor = set_attn_processor


def _warn_if_unasked(method: str, others_stay: bool) -> None:
    """Says that a method is off where a function of diffusers set other processors, as those of IP-Adapters do.

    Nothing is said to users who set them: that is one way to take a method off.

    Args:
        method: name of its class.
        others_stay: whether caches, controls or hooks are still on, beside which nothing can be accelerated anew.
    """
    frame: FrameType | None = sys._getframe(2)  # the caller of set_attn_processor, which is two levels up
    if _package_of(frame) != "diffusers":
        return
    level = 3
    while frame is not None and _package_of(frame) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    remedy = "set it once more with set_attn_processor()" if others_stay else "call accelerate() again"
    warnings.warn(f"dit_accel: other attention processors were set, so {method} is off; {remedy}", stacklevel=level)


def _package_of(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", "")).partition(".")[0]


_EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.pipelines.pipeline_utils": _extend_pipelines,
    "diffusers.models.attention": _extend_models,
}
