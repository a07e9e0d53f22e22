"""One attention module under our care: what its next call shall do is decided before the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..controls import AttentionCall, AttentionControl, SiteInfo

if TYPE_CHECKING:
    from ..clock import StepState
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout

Stock = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Site:
    """State of one attention module between :meth:`prepare`, which decides, and :meth:`attend`, which obeys.

    The split keeps decisions out of compiled code, where only ``is_stock`` and the tensors of the plan are looked at,
    never a layer or step number.

    Args:
        info: where the module is.
        controls: every control that may act here.
    """

    def __init__(self, info: SiteInfo, controls: tuple[AttentionControl, ...] = ()) -> None:
        self.info = info
        self.controls = controls
        self.layout: TokenLayout | None = None  # of the coming call, set by the root's installation
        self.active: tuple[AttentionControl, ...] = ()
        self.call: AttentionCall | None = None
        self.plan: SparsePlan | None = None
        self.is_stock = True
        self.refusal: str | None = None
        self.backend = "auto"

    def prepare(self, state: StepState, plan: SparsePlan | None) -> None:
        """Sets what the next call does: sparse by ``plan``, or stock if it is None; and which controls act."""
        self.plan = plan
        self.active = tuple(control for control in self.controls if control.acts_at(state))
        self.call = AttentionCall(self.info, state, self.layout or state.layout) if self.active else None
        self.is_stock = plan is None and not self.active

    def rest(self) -> None:
        """Makes calls stock again until the next :meth:`prepare`, and lets go of the plan."""
        self.plan, self.active, self.call, self.is_stock = None, (), None, True

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,
        plain: bool,
        stock: Stock,
    ) -> torch.Tensor:
        """One attention call, ``[batch, heads, tokens, head_dim]`` in and out.

        Args:
            query: as the stock processor made it, rotary embedding applied.
            key: likewise.
            value: likewise.
            scale: softmax scale, None for the usual one.
            plain: whether there is no mask, dropout, causality or context parallelism.
            stock: what the stock processor would have called.
        """
        for control in self.active:
            query, key, value = control.before(self._call(), query, key, value)
        output = self._compute(query, key, value, scale, plain, stock)
        for control in self.active:
            output = control.after(self._call(), output)
        for control in self.active:
            control.record(self._call(), query, key, value, output)
        return output

    def _compute(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        plain: bool,
        stock: Stock,
    ) -> torch.Tensor:
        plan = self.plan
        if plan is None:
            return stock(query, key, value)
        refusal = self._refuses(query, key, plain)
        if refusal is not None:
            self.refusal = refusal
            return stock(query, key, value)
        from ..kernels.attend import attend

        return attend(query, key, value, plan, scale=scale, backend=self.backend)

    @staticmethod
    def _refuses(query: torch.Tensor, key: torch.Tensor, plain: bool) -> str | None:
        """Why a planned call must run dense after all; the report and a warning then say so."""
        if not plain:
            return "the model passes a mask, dropout, causality or context parallelism with this call"
        if query.shape[1] != key.shape[1]:
            return "query and key have different numbers of heads"
        return None

    def _call(self) -> AttentionCall:
        assert self.call is not None  # set by prepare whenever a control is active
        return self.call
