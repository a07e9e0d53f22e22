"""The base class of methods that follow no plan: they compute the attention of a call themselves."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from .base import SparseAttnProcessor

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..layout import TokenLayout


class OperatorAttnProcessor(SparseAttnProcessor):
    """A method that turns queries, keys and values into an output where no list of pairs would say how.

    It keeps nothing between calls: a call follows from the settings, the site, the layout, the step and its tensors.
    Sites keep what :meth:`set_up` made, for one layout and device.
    """

    def set_up(self, site: SiteInfo, layout: TokenLayout, device: torch.device) -> Any:
        """All that :meth:`at_step` and :meth:`attend` need besides the tensors of a call; by default the layout.

        Runs outside compiled code, once per site, layout and device.

        Raises:
            ValueError: if the method cannot work with the layout.
        """
        return layout

    def at_step(self, setup: Any, site: SiteInfo, state: StepState) -> Any:
        """What :meth:`attend` is given at one step; None: the site runs the model's own attention in this call.

        Runs before every call, outside compiled code, so it may read the step but must not wait for the device.
        Tensors may change in value from step to step; anything else that changes is another graph under torch.compile.

        Args:
            setup: what :meth:`set_up` gave.
            site: which attention module.
            state: which step; its layout is that of the root.
        """
        return setup

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, setup: Any, *, scale: float | None
    ) -> torch.Tensor:
        """The output of one attention call.

        Runs inside compiled code, so it must be traceable as one graph and must not wait for the device.

        Args:
            query: ``[batch, heads, tokens, head_dim]``, rotary embedding applied.
            key: likewise.
            value: likewise.
            setup: what :meth:`at_step` gave, never None.
            scale: softmax scale, None for the usual one.

        Returns:
            shape and dtype of the query.
        """

    @abstractmethod
    def cost(self, setup: Any) -> float:
        """Scores computed for one head of such a call over those of dense attention; what reports show as density.

        Args:
            setup: what :meth:`at_step` gave, never None.
        """
