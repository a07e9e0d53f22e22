"""One attention module under our care: what its next call shall do is decided before the model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..controls import AttentionCall, AttentionControl, SiteInfo
from ..kernels.bitmap import Bitmap
from ..kernels.search.plan import device_density
from .permutation import plan_inside

if TYPE_CHECKING:
    from ..clock import StepState
    from ..kernels.sparse_plan import SparsePlan
    from ..layout import TokenLayout
    from ..processors.base import DynamicAttnProcessor, Memory
    from ..processors.operator import OperatorAttnProcessor
    from ..timing import Timer

Stock = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_SET_UPS_KEPT = 4  # of a site: branches of guidance may have texts of different lengths, anchors a method of their own


@dataclass(frozen=True)
class KeptPlan:
    """A plan found at one step, for those that follow.

    Attributes:
        layout: of the call that found it.
        plan: what was found.
        density: kept pairs over all pairs, a scalar on the plan's device; reading it waits for the device.
        batch: batch size of that call; lists for one item would fit, and fail, any other.
        memory: what the search remembered.
        factor: of the schedule on the budget of that search.
        measure: of the latest call that followed the plan, a scalar on the device.
    """

    layout: TokenLayout
    plan: SparsePlan
    density: torch.Tensor
    batch: int
    memory: Memory = ()
    factor: float = 1.0
    measure: torch.Tensor | None = None


class Site:
    """State of one attention module between :meth:`prepare`, which decides, and :meth:`attend`, which obeys.

    The split keeps decisions out of compiled code, where only ``is_stock``, whether there is a plan, and the tensors
    of the plan are looked at, never a layer or step number.

    Args:
        info: where the module is.
        controls: every control that may act here.
    """

    def __init__(self, info: SiteInfo, controls: tuple[AttentionControl, ...] = ()) -> None:
        self.info = info
        self.controls = controls
        self.layout: TokenLayout | None = None  # of the coming call, without the padding
        self.padding: int | None = None  # tokens behind it, which the mask of the call hides; None: no such mask
        self.active: tuple[AttentionControl, ...] = ()
        self.call: AttentionCall | None = None
        self.plan: SparsePlan | None = None
        self.plan_batch = 0  # for which a kept plan was found
        self.memory: Memory | None = None  # of the search that found it
        self.search: DynamicAttnProcessor | None = None
        self.operator: OperatorAttnProcessor | None = None  # computes the coming call itself
        self.setup: Any = None
        self.found: SparsePlan | None = None  # by the search of the latest call
        self.found_batch = 0
        self.found_compiled = False
        self.found_memory: Memory = ()
        self.factor = 1.0  # of the schedule on the budget of the coming call
        self.found_dense = False  # whether the call that searched ran dense itself
        self.measured: torch.Tensor | None = None
        self.reached = False  # whether the processor of the module has run in the latest call
        self.acted = False  # whether an attention call has come here since, and the method took it
        self.is_stock = True
        self.timer: Timer | None = None  # takes the time of every call, stock ones too
        self.refusal: str | None = None
        self.backend = "auto"
        self._kept: dict[str, KeptPlan] = {}  # by branch
        self._owes: set[str] = set()  # branches whose call was skipped when it was to search
        self._generation = -1
        self._set_ups: dict[tuple[object, TokenLayout, torch.device], Any] = {}  # by method, layout and device

    def set_tokens(self, layout: TokenLayout, padding: int | None) -> None:
        """Says where the tokens of the coming call are, before :meth:`prepare`.

        Args:
            layout: of the whole sequence, hidden tokens counted as text.
            padding: how many at its end the mask hides from all; None if there is no mask, or another one.
        """
        self.layout, self.padding = layout.without_end(padding or 0), padding

    def knows(self, mask: torch.Tensor | None) -> bool:
        """Whether a call's mask is none, or hides the padding and nothing else."""
        return mask is None or self.padding is not None

    def prepare(
        self,
        state: StepState,
        plan: SparsePlan | None = None,
        search: DynamicAttnProcessor | None = None,
        device: torch.device | None = None,
        renew: bool = False,
        operator: OperatorAttnProcessor | None = None,
    ) -> None:
        """Sets what the next call does, and which controls act.

        Args:
            state: where in the generation the call stands.
            plan: what to follow, for tokens in raster order; None with ``search`` also None means stock.
            search: finds the plan of the call, unless it lets the site follow the one it kept.
            device: where the call will run; for ``search`` and ``operator``.
            renew: whether it searches in any case.
            operator: computes the call, unless it leaves the step to the stock processor.
        """
        layout = self.layout or state.layout
        plan = None if plan is None else plan_inside(plan, layout.order)
        self._drop_stale(state, layout)
        self.search, self.found, self.measured, self.memory = search, None, None, None
        self.found_dense = False
        self.operator, self.reached, self.acted = None, False, False
        if operator is not None and device is not None:
            self.setup = operator.at_step(self._setup_for(operator, layout, device), self.info, state)
            self.operator = None if self.setup is None else operator
        if search is not None and device is not None:
            self.setup = search.at_step(self._setup_for(search, layout, device), self.info, state)
            self.factor = search.budget_factor(self.info, state)
            kept = self._kept.get(state.branch)
            if kept is not None:
                self.plan_batch, self.memory = kept.batch, kept.memory
                due = renew or state.branch in self._owes or kept.factor != self.factor
                if not (due or search.renews(self.info, state)):
                    plan = kept.plan
        self.plan = plan
        self.active = tuple(control for control in self.controls if control.acts_at(state))
        whole = replace(layout, padding=self.padding) if self.padding else layout  # controls see the padding, too
        self.call = AttentionCall(self.info, state, whole) if self.active else None
        decides = plan is not None or search is not None or self.operator is not None
        self.is_stock = not (decides or self.active or self.timer is not None)

    def set_up(
        self, method: DynamicAttnProcessor | OperatorAttnProcessor, state: StepState, device: torch.device
    ) -> None:
        """Makes what a method needs at this layout, which refuses a layout that it does not fit."""
        self._setup_for(method, self.layout or state.layout, device)

    def settle(self, state: StepState) -> float | torch.Tensor | None:
        """After a call: keeps the plan it found, and says how dense the plan was that it followed.

        Returns:
            kept pairs over all pairs; None if no call followed one. A tensor is on the device, not yet read.
        """
        layout = self.layout or state.layout
        if self.found is not None:
            self._owes.discard(state.branch)
            plan, memory = self.found, self.found_memory
            if self.found_compiled:
                plan, memory = _own(plan), tuple(part.clone() for part in memory)
            density = device_density(plan)
            self._kept[state.branch] = KeptPlan(layout, plan, density, self.found_batch, memory, self.factor)
        elif self.measured is not None and (followed := self._kept.get(state.branch)) is not None:
            self._kept[state.branch] = replace(followed, measure=self.measured.clone())
        kept = self._kept.get(state.branch)
        if self.search is not None and state.steps is not None and state.step == state.steps - 1:
            self._kept.pop(state.branch, None)  # nobody will follow it
        if not self.acted or self.refusal is not None or self.found_dense:
            return None
        if self.operator is not None:
            return self.operator.cost(self.setup)
        if self.search is not None:
            return None if kept is None else kept.density
        return None if self.plan is None else self.plan.density

    def skip(self, state: StepState) -> None:
        """After a call of the root that skipped the module: a search that was due is due at the next call."""
        if self.search is not None and self.plan is None:
            self._owes.add(state.branch)

    def measure_of(self, state: StepState) -> torch.Tensor | None:
        """What the latest call of the same branch measured, for the method to say whether to search anew."""
        self._drop_stale(state, self.layout or state.layout)
        kept = self._kept.get(state.branch)
        return None if kept is None else kept.measure

    @property
    def is_unused(self) -> bool:
        """After a call of the root: whether the module was not called, so that there is nothing to count."""
        return not self.reached and not self.acted

    def rest(self) -> None:
        """Makes calls stock again until the next :meth:`prepare`, and lets go of the plan."""
        self.plan, self.search, self.setup, self.found = None, None, None, None
        self.operator = None
        self.memory, self.found_memory, self.measured = None, (), None
        self.active, self.call, self.is_stock = (), None, True
        self.reached, self.acted = False, False

    def forget(self) -> None:
        """Drops every plan that was kept."""
        self._kept.clear()
        self._owes.clear()
        self._set_ups.clear()

    def _drop_stale(self, state: StepState, layout: TokenLayout) -> None:
        if state.generation != self._generation:
            self._generation = state.generation
            self._kept.clear()
            self._owes.clear()
        kept = self._kept.get(state.branch)
        if kept is not None and kept.layout != layout:
            del self._kept[state.branch]

    def _setup_for(
        self, search: DynamicAttnProcessor | OperatorAttnProcessor, layout: TokenLayout, device: torch.device
    ) -> Any:
        key = (search, layout, device)
        if key not in self._set_ups:
            while len(self._set_ups) >= _SET_UPS_KEPT:
                self._set_ups.pop(next(iter(self._set_ups)))
            with torch.inference_mode(False):  # what is kept may be used in training later
                self._set_ups[key] = search.set_up(self.info, layout, device)
        return self._set_ups[key]

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
            plain: whether there is no dropout, causality or context parallelism, nor a mask but a known one.
            stock: what the stock processor would have called.
        """
        for control in self.active:
            query, key, value = control.before(self._call(), query, key, value)
        if self.timer is None or torch.compiler.is_compiling():
            output = self._compute(query, key, value, scale, plain, stock)
        else:
            with self.timer.span("attention"):
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
        if self.plan is None and self.search is None and self.operator is None:
            return stock(query, key, value)
        refusal = self._refuses(query, key, plain)
        if refusal is not None:
            self.refusal = refusal
            return stock(query, key, value)
        if self.padding:
            seen = slice(-self.padding)
            output = self._lowered(query[:, :, seen], key[:, :, seen], value[:, :, seen], scale)
            if output is not None:
                output = torch.nn.functional.pad(output, (0, 0, 0, self.padding))  # which no other token ever sees
        else:
            output = self._lowered(query, key, value, scale)
        return stock(query, key, value) if output is None else output

    def _lowered(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor | None:
        """As :meth:`_follow`, with what autocast does for the stock attention: it casts first, and not inside."""
        kind = query.device.type
        if not torch.is_autocast_enabled(kind):
            return self._follow(query, key, value, scale)
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (
            part.to(dtype) if part.is_floating_point() and part.dtype != torch.float64 else part
            for part in (query, key, value)
        )
        with torch.autocast(kind, enabled=False):
            return self._follow(query, key, value, scale)

    def _follow(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor | None:
        """What the method makes of a call, without the padding; None if the model's own attention is to run."""
        self.acted = True
        if self.operator is not None:
            return self.operator.attend(query, key, value, self.setup, scale=scale)
        from ..kernels.attend import attend
        from ..kernels.residual import block_residual

        plan = self._plan_for(query, key, value, scale)
        if plan is None:
            return None
        residual = None
        if self.search is not None and self.search.compensate:  # means of this call's keys, also for a kept plan
            residual = block_residual(key, value, plan.block_kv, order=plan.key_order)
        return attend(query, key, value, plan, residual=residual, scale=scale, backend=self.backend)

    def _plan_for(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> SparsePlan | None:
        """The plan set by :meth:`prepare`, or a new one if none fits; None: one was found, but run dense."""
        plan, search = self.plan, self.search
        batch = query.shape[0]
        if search is None or (plan is not None and self.plan_batch == batch and plan.device == query.device):
            assert plan is not None  # else the call would be stock
            if search is not None and search.measures and self.memory is not None:
                self.measured = search.measure(query, key, self.memory)
            return plan
        memory = self._memory_for(query, search)
        found, self.found_memory = search.search_with_values(query, key, value, self.setup, memory, scale=scale)
        self.found, self.found_batch, self.found_compiled = found, batch, torch.compiler.is_compiling()
        self.found_dense = search.dense_first and memory is None
        return None if self.found_dense else found

    def _memory_for(self, query: torch.Tensor, search: DynamicAttnProcessor) -> Memory | None:
        """What the site remembers of an earlier search, if the call looks like that one."""
        if not (search.remembers or search.dense_first) or self.memory is None or self.plan_batch != query.shape[0]:
            return None
        return self.memory if all(part.device == query.device for part in self.memory) else None

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


def _own(plan: SparsePlan) -> SparsePlan:
    """The plan with lists of its own: compiled code that runs as CUDA graphs writes its next results over the last."""
    counts = plan.counts.clone()
    full_counts = counts if plan.full_counts is plan.counts else plan.full_counts.clone()
    test = plan.pair_test
    if isinstance(test, Bitmap):
        test = replace(test, slots=test.slots.clone(), words=test.words.clone())
    order, kv_order = (None if part is None else part.clone() for part in (plan.order, plan.kv_order))
    plan = replace(plan, indices=plan.indices.clone(), counts=counts, full_counts=full_counts, pair_test=test)
    return replace(plan, order=order, kv_order=kv_order)
