"""Puts a function around the forward of one module, on the instance, so that it can be taken off again."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

Around = Callable[[Callable[[], Any], tuple[Any, ...], dict[str, Any]], Any]
#: Where the hooks of accelerate's offloading keep the forward that they run. They put it back, and wrap it anew, after
#: every generation: what is around them then is lost, what is inside stays.
_OFFLOADED = "_old_forward"


def wrap_forward(module: nn.Module, around: Around, *, whole: bool = False) -> Callable[[], None]:
    """Calls ``around(run, args, kwargs)`` in place of a module's forward; ``run()`` computes it.

    If the module is compiled later (``module.compile()``, diffusers' ``compile_repeated_blocks()``), its own forward
    is compiled and ``around`` stays outside, so that what it decides is no part of a graph. A deep copy of the module
    runs its own forward, without ``around``.

    Args:
        module: any module, not compiled yet.
        around: what to call.
        whole: whether the module is a root, whose ``compile()`` its installation answers for.

    Returns:
        a function that undoes it, in any order with others. What someone else has wrapped since stays in place, and
        runs the module as if this had never been there.

    Raises:
        ValueError: if the module is compiled already.
    """
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{type(module).__name__} is compiled already, and hooks on it would be compiled in; accelerate first, "
            "compile then"
        )
    layer = _Layer(module, around)
    layer.put(compiles=not whole)
    return layer.take_off


def innermost_forward(module: nn.Module) -> Callable[..., Any]:
    """What :func:`wrap_forward` would wrap now: the forward, within any hooks of accelerate's offloading."""
    forward: Callable[..., Any] = vars(module).get(_OFFLOADED, module.forward)
    return forward


class _Layer:
    """One function around one module; methods of the module lead to it, which deep copies bind to the copy."""

    def __init__(self, module: nn.Module, around: Around) -> None:
        self.module, self.around = module, around
        self.below = innermost_forward(module)
        self.compile_below: Callable[..., Any] = module.compile
        self.run: Callable[..., Any] = self.below  # compiled later, perhaps
        self.is_on = True

    def put(self, compiles: bool) -> None:
        """Onto the module."""
        slot = _OFFLOADED if _OFFLOADED in vars(self.module) else "forward"
        object.__setattr__(self.module, slot, MethodType(_forward_of(self), self.module))
        if compiles:
            object.__setattr__(self.module, "compile", MethodType(_compile_of(self), self.module))

    def take_off(self) -> None:
        """Whatever leads here yet is led to what lies below."""
        self.is_on = False
        for name in ("forward", _OFFLOADED, "compile"):
            if _layer_of(vars(self.module).get(name)) is self:
                self._restore(name, self.compile_below if name == "compile" else self.below)

    def _restore(self, name: str, below: Callable[..., Any]) -> None:
        while (layer := _layer_of(below)) is not None and not layer.is_on:
            below = layer.compile_below if name == "compile" else layer.below
        if name != _OFFLOADED and below == MethodType(getattr(type(self.module), name), self.module):
            vars(self.module).pop(name)
        else:
            object.__setattr__(self.module, name, below)


def _forward_of(layer: _Layer) -> Callable[..., Any]:
    def forward(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if owner is not layer.module:
            return _moved(layer.below, owner, "forward")(*args, **kwargs)
        if not layer.is_on:
            return layer.run(*args, **kwargs)
        return layer.around(lambda: layer.run(*args, **kwargs), args, kwargs)

    return _led(forward, layer)


def _compile_of(layer: _Layer) -> Callable[..., Any]:
    def compile_inside(owner: nn.Module, *args: Any, **kwargs: Any) -> None:
        if owner is not layer.module:
            _moved(layer.compile_below, owner, "compile")(*args, **kwargs)
        elif _layer_of(layer.compile_below) is not None:  # it compiles what it wraps
            layer.compile_below(*args, **kwargs)
        else:
            layer.run = torch.compile(layer.below, *args, **kwargs)

    return _led(compile_inside, layer)


def _led(function: Callable[..., Any], layer: _Layer) -> Callable[..., Any]:
    vars(function)["layer"] = layer
    return function


def _layer_of(method: Any) -> _Layer | None:
    """The layer that a method leads to; None for what is not ours (wrappers of others copy our attributes)."""
    return getattr(method, "layer", None) if isinstance(method, MethodType) else None


def _moved(method: Callable[..., Any], owner: nn.Module, name: str) -> Callable[..., Any]:
    """The same method of a copy of its module; the stock one for what is bound to the original in other ways."""
    function = method.__func__ if isinstance(method, MethodType) else getattr(type(owner), name)
    return MethodType(function, owner)
