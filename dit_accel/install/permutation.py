"""Token permutation once per call of a model, instead of once per attention call.

Between its patch embedding and its last projection a transformer treats tokens alike; it tells them apart by what is
made for each of them beforehand (rotary tables, modulation by a timestep per token). Permute all of these and the
output is permuted. So we permute where they are made, by forward hooks on the few modules that the family names, and
put the order right behind the last one: no block is wrapped for it, and compiled blocks share their graph as before.

Inside, everything else sees permuted tokens: block hooks, attention processors and controls. Their layout says how
(:attr:`dit_accel.layout.TokenLayout.order`). Attention without a plan does not depend on the order.

Source: "may be done once before the first block and once after the last", Generalized Neighborhood Attention, arXiv
2504.16922, section on token permutation.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..kernels.token_order import check_order, inverse_order, plan_in_order
from ..layout import TokenLayout
from .blocks import BlockHook

if TYPE_CHECKING:
    from ..families import Family
    from ..kernels.sparse_plan import SparsePlan

OrderFor = Callable[[TokenLayout], "torch.Tensor | None"]
_ORDERS_KEPT = 8  # token layouts whose orders stay in memory

_moved: WeakKeyDictionary[SparsePlan, tuple[torch.Tensor, SparsePlan]] = WeakKeyDictionary()


class TokenPermutation(BlockHook):
    """Puts video tokens into another order for all blocks of a model; given among the block hooks.

    The model's output is that without it, up to rounding. What changes is which tokens are neighbors in the sequence,
    and so what a block of a plan covers. Plans made for this order (``SparsePlan.order``) run without any copy.

    Args:
        order_for: gives the order for a layout, int64 ``[layout.length]`` as in ``SparsePlan.order``, or None to leave
            it as it is; for example ``lambda layout: morton_order(layout.grid)``. Asked once per layout and device.
            Tokens that are no video must stay where they are.
    """

    def __init__(self, order_for: OrderFor) -> None:
        if not callable(order_for):
            raise ValueError(
                "a token order is a function of the token layout, such as lambda layout: morton_order(layout.grid), "
                f"see dit_accel.kernels.token_order; got {type(order_for).__name__}"
            )
        self.order_for = order_for
        self._orders: dict[tuple[TokenLayout, torch.device], torch.Tensor | None] = {}

    def order(self, layout: TokenLayout, device: torch.device) -> torch.Tensor | None:
        """The order for a layout, checked, on a device; the same tensor each time.

        Raises:
            ValueError: if it is no permutation of the layout's tokens, or moves others than those of the video.
        """
        key = (layout, device)
        if key not in self._orders:
            order = self._made(layout, device)
            while len(self._orders) >= _ORDERS_KEPT:
                self._orders.pop(next(iter(self._orders)))
            self._orders[key] = order
        return self._orders[key]

    def _made(self, layout: TokenLayout, device: torch.device) -> torch.Tensor | None:
        with torch.inference_mode(False):  # what is kept may be used in training later
            order = self.order_for(layout)
            if order is None:
                return None
            if order.is_inference():  # made before, by somebody else
                order = order.clone()
            _check(order, layout)
            return order.to(device)


class PermutedStack:
    """A :class:`TokenPermutation` at work on one root.

    Args:
        permutation: which order.
        root: the model.
        family: what is known about it.

    Raises:
        ValueError: if the family does not say where its tokens can be permuted.
    """

    def __init__(self, permutation: TokenPermutation, root: nn.Module, family: Family) -> None:
        if family.token_stream is None:
            raise ValueError(
                f"the tokens of {family.root_class} cannot be permuted once per call; give the order to the plans "
                "instead (SparsePlan.order), which permutes in every attention call"
            )
        self._permutation, self._root, self._stream = permutation, root, family.token_stream
        self._order: torch.Tensor | None = None
        self._inverse: torch.Tensor | None = None
        self._hooked: dict[str, tuple[nn.Module, Any]] = {}
        self._attach()

    def begin(self, layout: TokenLayout, device: torch.device) -> TokenLayout:
        """Sets the order of the coming call of the root; runs before it, outside compiled code.

        Returns:
            the layout that its blocks see.
        """
        self._attach()
        order = self._permutation.order(layout, device)
        if order is not self._order:
            with torch.inference_mode(False):  # a plain tensor, as the order is
                self._inverse = None if order is None else inverse_order(order)
        self._order = order
        return replace(layout, order=order)

    def rest(self) -> None:
        """Leaves modules alone that are called outside the root."""
        self._order = self._inverse = None

    def remove(self) -> None:
        """Takes the hooks off."""
        for _, handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()

    def _attach(self) -> None:
        """Hooks the modules of the stream; those that were replaced since, as LoRA layers do, anew."""
        paths = (*self._stream.makers, self._stream.exit)
        for path, module in [(path, self._root.get_submodule(path)) for path in paths]:
            module_before, handle = self._hooked.get(path, (None, None))
            if module is module_before:
                continue
            if handle is not None:
                handle.remove()
            hook = self._leave if path == self._stream.exit else functools.partial(self._enter, path)
            self._hooked[path] = (module, module.register_forward_hook(hook))

    def _enter(self, path: str, module: nn.Module, args: Any, output: Any) -> Any:
        if self._order is None:
            return output
        return self._stream.makers[path](output, functools.partial(_take, self._order))

    def _leave(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self._inverse is None else _take(self._inverse, output, 1)


def permuted_stack(
    hooks: Sequence[BlockHook], root: nn.Module, family: Family
) -> tuple[PermutedStack | None, tuple[BlockHook, ...]]:
    """Parts the token permutation, which acts on the stack as a whole, from hooks around single blocks.

    Raises:
        ValueError: if there are several, or the family does not allow one.
    """
    permutations = [hook for hook in hooks if isinstance(hook, TokenPermutation)]
    if len(permutations) > 1:
        raise ValueError(f"tokens can be in one order only; got {len(permutations)} token permutations")
    others = tuple(hook for hook in hooks if not isinstance(hook, TokenPermutation))
    return (PermutedStack(permutations[0], root, family) if permutations else None), others


def plan_inside(plan: SparsePlan, order: torch.Tensor | None) -> SparsePlan:
    """The plan to follow inside blocks that run in an order; computed once per plan.

    A plan for another order is right too, but permutes at every call: a warning says so.

    Args:
        plan: for raster tokens, with or without an order of its own.
        order: of the blocks; None for raster.
    """
    if order is None:
        return plan
    known = _moved.get(plan)
    if known is None or known[0] is not order:
        known = (order, plan_in_order(plan, order))
        if known[1].order is not None:
            warnings.warn(
                f"dit_accel: the {plan.stats.method} plan is made for another token order than that of the blocks, so "
                "every call permutes its tokens again; make plan and blocks agree, or leave the token permutation out",
                stacklevel=2,
            )
        _moved[plan] = known
    return known[1]


def _check(order: torch.Tensor, layout: TokenLayout) -> None:
    check_order(order, layout.length)
    start, stop = layout.visual
    rest = torch.arange(layout.length, device=order.device)
    if not (torch.equal(order[:start], rest[:start]) and torch.equal(order[stop:], rest[stop:])):
        raise ValueError(
            f"the token order moves tokens outside the video, which is at {layout.visual}; build it for the grid and "
            "extend it by dit_accel.kernels.token_order.with_text"
        )


def _take(order: torch.Tensor, tensor: torch.Tensor, axis: int) -> torch.Tensor:
    if tensor.shape[axis] != order.numel():
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} should hold {order.numel()} tokens along axis {axis} to be put "
            "into another order; token permutation does not work with sharded tokens (context parallelism)"
        )
    return tensor.index_select(axis, order.to(tensor.device))
