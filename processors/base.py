"""The base classes of every sparse attention method: a method says which plan, and when it is renewed."""

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

Memory = tuple[torch.Tensor, ...]  # what a search leaves to later ones, in the order of the method

PUBLISHED_WARM_UP = 0.24  # 12 of 50 steps, what the papers of this field run dense


class SparseAttnProcessor(ABC):
    """A recipe for sparse attention, given to ``set_attn_processor`` or :func:`dit_accel.accelerate`.

    The recipe itself never runs: installing it puts one bound processor on every attention module, and those ask it
    for plans. It holds settings only, so one recipe may serve several pipelines. Methods derive from
    :class:`StaticAttnProcessor` or :class:`DynamicAttnProcessor`.

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


class StaticAttnProcessor(SparseAttnProcessor):
    """A method whose plan follows from the token layout alone."""

    @abstractmethod
    def build_plan(self, layout: TokenLayout, device: torch.device) -> SparsePlan:
        """The plan for one token layout; called once per layout and device, and kept."""

    def for_site(self, site: SiteInfo) -> StaticAttnProcessor:
        """The recipe whose plan a site follows: this one, or another where layers differ, the same at every call."""
        return self


class DynamicAttnProcessor(SparseAttnProcessor):
    """A method that finds its plan from the queries and keys of a call.

    Each attention module keeps the plan it found, one for each branch of guidance, until :meth:`renews` asks for
    another. Plans are dropped at the start of a generation, when the token layout changes, and on removal; a call
    that finds none kept searches, whatever :meth:`renews` says.

    Methods that want more than that say so by their attributes. With the plan a site then keeps what :meth:`search`
    remembers; it belongs to the same branch, and is dropped with the plan.

    Args:
        compensate: whether blocks that a plan leaves out still count, each by its mean key and its summed values
            (:func:`dit_accel.kernels.residual.block_residual`), in calls that search and in those that follow.
        dense_steps: sampling steps that stay dense, see :class:`SparseAttnProcessor`.
        dense_layers: layers that stay dense.
        backend: kernel backend.

    Raises:
        ValueError: if compensate is neither True nor False.

    Attributes:
        dense_first: whether a call that searches because no plan was kept runs dense itself, bit for bit as stock.
        remembers: whether searches are given what the one before remembered.
        measures: whether calls that follow a plan are measured (:meth:`measure`), so that a site may search for what
            has changed (:meth:`has_drifted`).
    """

    dense_first: bool = False
    remembers: bool = False
    measures: bool = False

    def __init__(
        self,
        *,
        compensate: bool = False,
        dense_steps: int | float = PUBLISHED_WARM_UP,
        dense_layers: int | Collection[int] = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dense_steps=dense_steps, dense_layers=dense_layers, backend=backend)
        if not isinstance(compensate, bool):
            raise ValueError(f"compensate is True or False; got {compensate!r}")
        self.compensate = compensate

    @abstractmethod
    def renews(self, site: SiteInfo, state: StepState) -> bool:
        """Whether a site searches anew at a step, or follows the plan it kept; runs outside compiled code.

        Every combination of answers over the sites of a model is a graph of its own under torch.compile.
        """

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Any:
        """All that :meth:`find_plan` needs besides query and key: ranges, a token order, what differs between layers.

        Runs outside compiled code, once per site, layout and device. By default the layout itself.

        Raises:
            ValueError: if the method cannot work with the layout.
        """
        return layout

    @abstractmethod
    def find_plan(self, query: torch.Tensor, key: torch.Tensor, setup: Any, *, scale: float | None) -> SparsePlan:
        """The plan of one attention call.

        Runs inside compiled code, so it must be traceable as one graph and must not wait for the device;
        :func:`dit_accel.kernels.search.plan.dynamic_plan` is both.

        Args:
            query: ``[batch, heads, tokens, head_dim]``, rotary embedding applied.
            key: likewise.
            setup: what :meth:`set_up` gave.
            scale: softmax scale, None for the usual one.
        """

    def search(
        self, query: torch.Tensor, key: torch.Tensor, setup: Any, memory: Memory | None, *, scale: float | None
    ) -> tuple[SparsePlan, Memory]:
        """As :meth:`find_plan`, which it calls, for methods that remember; inside compiled code, too.

        Args:
            query: as there.
            key: as there.
            setup: as there.
            memory: what the latest search remembered; None if there is no plan or the method does not remember.
            scale: as there.

        Returns:
            the plan, and what to remember.
        """
        return self.find_plan(query, key, setup, scale=scale), ()

    def measure(self, query: torch.Tensor, key: torch.Tensor, memory: Memory) -> torch.Tensor:
        """How far a call that follows a plan is from the one that found it: a scalar on the device.

        Runs inside compiled code as :meth:`find_plan` does; asked only if ``measures``.

        Args:
            query: as there.
            key: as there.
            memory: what the search remembered.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it measures, and has no measure()")

    def has_drifted(self, measures: torch.Tensor) -> bool:
        """Whether all sites of a model search anew, although :meth:`renews` does not say so.

        Asked once before each call of the model, outside compiled code, so it may read the device.

        Args:
            measures: what the sites measured at their latest calls of the same branch, one number for each.
        """
        return False


def check_search_every(steps: object) -> None:
    """Refuses what is no distance between searches.

    Raises:
        ValueError: if it is no whole number of steps, or below 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"search_every is a number of steps, 1 or more; got {steps!r}")
