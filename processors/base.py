"""The one base class of every sparse attention method: a method says which plan, and when it is renewed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..plan.policy import PlanPolicy

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..families import Family
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout

PUBLISHED_WARM_UP = 0.24  # 12 of 50 steps, what the papers of this field run dense


class SparseAttnProcessor(ABC):
    """A recipe for sparse attention, given to ``set_attn_processor`` or :func:`dit_accel.accelerate`.

    The recipe itself never runs: installing it puts one bound processor on every attention module, and those ask it
    for plans. It holds settings only, so one recipe may serve several pipelines.

    Args:
        dense_steps: sampling steps that stay dense at the start; an int counts steps, a float is a fraction of all.
        dense_layers: layers that stay dense: a number (the first so many) or a collection of indices.
        backend: kernel backend, see :func:`dit_accel.kernels.attend.attend`; an explicit choice never falls back.
    """

    kinds: tuple[str, ...] = ("self", "joint")
    block: int = 128  # tokens per block of the plans it builds; what a kernel must be able to walk
    needs_frames: bool = False  # whether it saves nothing within one frame, and so on images

    def __init__(
        self,
        *,
        dense_steps: int | float = PUBLISHED_WARM_UP,
        dense_layers: int | Collection[int] = 0,
        backend: str = "auto",
    ) -> None:
        self.policy = PlanPolicy(dense_steps=dense_steps, dense_layers=dense_layers)
        self.backend = backend

    @abstractmethod
    def build_plan(self, layout: TokenLayout, device: torch.device) -> SparsePlan:
        """The plan for one token layout; called once per layout and device, and kept."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything needed to build an equal recipe, as plain values."""

    def check_family(self, family: Family) -> None:
        """Refuses a family of models for which this method can do nothing.

        Raises:
            ValueError: if the family makes images and the method lives on the distance between frames.
        """
        if self.needs_frames and not family.makes_video:
            raise ValueError(
                f"{type(self).__name__} keeps every pair of tokens within a frame, so it saves nothing in "
                f"{family.root_class}, which makes single images; use it with a video model, or leave attention out"
            )

    def is_sparse(self, site: SiteInfo, state: StepState) -> bool:
        """Whether a site runs this method at a step, or stays dense."""
        return site.kind in self.kinds and not self.policy.is_dense(state.step, state.steps, site.layer)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: a recipe put on a module by hand has no plan to follow."""
        raise RuntimeError(
            f"{type(self).__name__} was put on an attention module by hand; install it with "
            "pipe.set_attn_processor(...), pipe.transformer.set_attn_processor(...) or dit_accel.accelerate(pipe, ...)"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"
